// What the operators of the fusion ask of the file that holds the kernels without a matrix product. No header of
// PyTorch comes in here, so that nvcc reads them once only.
#pragma once

#include "fusion_operands.h"
#include "simt.h"

namespace fflfast::cuda {

struct StatisticsCall {
  Features features;
  WeightOperand weight;
  float* moments;  // (2, C)
};

struct InputsCall {
  Features features;
  Feature gradient[kFeatureMaps];  // data null: not wanted
  WeightOperand weight;
  NormOperand norm;
  const float* sums;      // (2, C): dβ1, dγ1
  const void* kept;       // gradient of the first norm's output, (B, H·W, C)
  void* weight_gradient;  // (C, 3, 3) of the weight's dtype; null: not wanted
};

struct PoolCall {
  const void* y;  // (B, H·W, O)
  NormOperand norm;
  void* pooled;   // (B, O) of y's dtype
  float* active;  // (2, B, O)
  int64_t batch;
  int32_t pixels, channels;
};

struct PoolSumsCall {
  const void* grad;     // (B, O)
  const float* active;  // (2, B, O)
  float* sums;          // (2, O): dβ2, dγ2
  int64_t batch;
  int32_t pixels, channels;
};

struct RunningNorm {
  const float* moments;  // (2, C)
  const float* count;    // null: known_count
  float known_count;
  float momentum;        // negative: the cumulative average
  float* mean;
  float* variance;
  int64_t* batches;      // null: not counted
  int32_t channels;
};

struct RunningCall {
  RunningNorm norm[2];
};

// How the pixels are cut for a kernel whose tiles are whole images, or whole rows of one.
struct RowTiles {
  int pixels;          // of a tile
  int halo;            // a row of the image, or none: pixels before and behind that depthwise outputs depend on
  int channel_blocks;  // each with `splits` blocks, which take every splits-th tile
  int64_t tiles, splits;
};

// Memory for partial sums and counters: what a launch with a last block wants beside its arguments.
struct Scratch {
  float* records;
  Tickets tickets;
};

// False where a row of an image is too wide for the shared memory of a block.
bool plan_statistics(const Features& features, Storage storage, const simt::DeviceProperties& device, RowTiles* cut);
bool plan_inputs(const Features& features, Storage storage, const simt::DeviceProperties& device, RowTiles* cut);
// Numbers of Scratch::records.
int64_t statistics_records(const RowTiles& cut, Storage storage);
int64_t inputs_records(const RowTiles& cut, Storage storage);

void launch_statistics(const StatisticsCall& call, Storage storage, const RowTiles& cut, const Scratch& scratch,
                       void* stream);
void launch_inputs(const InputsCall& call, Storage storage, const RowTiles& cut, const Scratch& scratch, void* stream);
void launch_pool(const PoolCall& call, Storage storage, const simt::DeviceProperties& device, void* stream);
void launch_backward_pool(const PoolSumsCall& call, Storage storage, void* stream);
void launch_update_running(const RunningCall& call, int norms, void* stream);

}  // namespace fflfast::cuda
