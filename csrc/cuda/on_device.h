// What the host code of every operator needs of the device: its stream, its properties, and counters for launches whose
// last block has more to do.
#pragma once

#include "../shim.h"
#include "simt.h"

#include <map>
#include <mutex>
#include <utility>

namespace fflfast {

#ifdef FFLFAST_EMULATE
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  const simt::DeviceProperties& properties = simt::device_properties(0);
  void* stream = simt::current_stream(0);
  int index = 0;
};
#else
// Makes the tensor's device current while it lives.
struct OnDevice {
  explicit OnDevice(const Tensor& like)
      : index(like.get_device_index()), guard(index), properties(simt::device_properties(index)),
        stream(simt::current_stream(index)) {}
  int index;
  DeviceGuard guard;
  const simt::DeviceProperties& properties;
  void* stream;
};
#endif

struct Ticket {
  int32_t slot = 0;
  std::optional<Tensor> own;

  unsigned* memory() const { return own ? static_cast<unsigned*>(mutable_data(*own)) : nullptr; }
};

// Which counters a launch takes its tickets from (last_block.cuh): a slot of `counters` of them, of `slots` that an
// operator's library has. A counter wraps to zero with its launch's last block, so launches that cannot overlap may
// share one, and none is ever set:
// - launches of one stream run one after the other: each stream has a slot;
// - a captured launch may be replayed on any stream beside any other launch, though never beside itself: each has a
//   slot that nothing else is given, for as long as the process lives;
// - where the library's slots have run out, counters come with the call, zeroed in stream order.
class TicketOffice {
 public:
  TicketOffice(int32_t slots, int32_t streams, int32_t counters)
      : slots_(slots), streams_(streams), counters_(counters), captured_(streams) {}

  Ticket take(const OnDevice& on, const Tensor& like) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (simt::is_capturing(on.stream)) {
        if (captured_ < slots_) return {captured_++, std::nullopt};
      } else {
        const auto known = of_stream_.find({on.index, on.stream});
        if (known != of_stream_.end()) return {known->second, std::nullopt};
        const auto next = static_cast<int32_t>(of_stream_.size());
        if (next < streams_) return {of_stream_[{on.index, on.stream}] = next, std::nullopt};
      }
    }
    Ticket ticket{0, empty({counters_}, Dtype::kFloat32, like)};
    torch::stable::zero_(*ticket.own);
    return ticket;
  }

 private:
  const int32_t slots_, streams_, counters_;
  std::mutex mutex_;
  std::map<std::pair<int, void*>, int32_t> of_stream_;
  int32_t captured_;
};

}  // namespace fflfast
