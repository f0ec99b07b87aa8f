// The emulator's settings and records, as C functions that Python reaches through ctypes (tests/simt_build.py).
#include "control.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

namespace fflfast::simt {
namespace {

constexpr unsigned kSites = 1 << 16;

using Visits = std::vector<bool>;  // by site

struct Controls {
  uint64_t sequence = 0;
  int skipped = -1;
  std::set<const void*> skipping_kernels;  // empty: all
  int resident = 2;
  double error_share = 1;
  bool capturing = false;
  DeviceProperties device{132, 90, 227 * 1024};
  std::map<const void*, Visits> visits;
  std::vector<int64_t> launches;
} controls;

// The running launch.
struct {
  const void* kernel;
  Visits* visits;
  int skipped;
} running;

std::set<int>& known_sites() {
  static std::set<int> sites;
  return sites;
}

template <class Range, class T>
int64_t copy_out(const Range& values, T* out, int64_t capacity) {
  std::copy_n(values.begin(), std::min(static_cast<int64_t>(values.size()), capacity), out);
  return static_cast<int64_t>(values.size());
}

uint64_t mix(uint64_t x) {  // SplitMix64's output function
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

const DeviceProperties& device_properties(int) { return controls.device; }
bool is_capturing(void*) { return controls.capturing; }

namespace emulator {

uint64_t draw() { return mix(controls.sequence += 0x9e3779b97f4a7c15); }

int add_site(int site) {
  known_sites().insert(site);
  return site;
}

void begin_launch(const void* kernel) {
  const auto& chosen = controls.skipping_kernels;
  Visits& visits = controls.visits[kernel];
  visits.resize(kSites);
  running = {kernel, &visits, chosen.empty() || chosen.count(kernel) != 0 ? controls.skipped : -1};
}

void end_launch(const Launch& launch, int64_t switches) {
  const auto shared = static_cast<int64_t>(launch.shared);
  const auto kernel = static_cast<int64_t>(reinterpret_cast<intptr_t>(running.kernel));
  controls.launches.insert(controls.launches.end(),
                           {kernel, launch.grid, launch.block, launch.cluster, shared, switches});
}

bool is_skipped(int site) {
  (*running.visits)[static_cast<unsigned>(site) % kSites] = true;
  return site == running.skipped;
}

int resident_clusters() { return controls.resident; }

// A value up to `bound` from the exact one, drawn from x itself; 0, infinities, NaN and the exact result 0 stay.
float within_bound(double exact, double bound, float x) {
  if (x == 0 || exact == 0 || !std::isfinite(exact) || !std::isfinite(x)) return static_cast<float>(exact);
  const double share = static_cast<double>(mix(bits_of_float(x)) >> 11) * 0x1p-52 - 1;
  return static_cast<float>(exact + controls.error_share * share * bound);
}

}  // namespace emulator

extern "C" {
#define EXPORTED __attribute__((visibility("default")))

EXPORTED void fflfast_simt_reset() { controls = Controls{}; }
EXPORTED void fflfast_simt_seed(uint64_t seed) { controls.sequence = mix(seed); }
// Skips a site (-1: none) in the given kernels, or in all where none is given.
EXPORTED void fflfast_simt_skip(int site, const void* const* kernels, int64_t count) {
  controls.skipped = site;
  controls.skipping_kernels = std::set<const void*>(kernels, kernels + count);
}
EXPORTED void fflfast_simt_resident(int clusters) { controls.resident = clusters; }
EXPORTED void fflfast_simt_error_share(double share) { controls.error_share = share; }
EXPORTED void fflfast_simt_capturing(int capturing) { controls.capturing = capturing != 0; }
EXPORTED void fflfast_simt_device(int sm_count, int capability, int64_t shared_per_block) {
  controls.device = {sm_count, capability, static_cast<size_t>(shared_per_block)};
}

// Each of these copies as much as there is room for and returns how much there is.
EXPORTED int64_t fflfast_simt_known_sites(int64_t* out, int64_t capacity) {
  return copy_out(known_sites(), out, capacity);
}

EXPORTED int64_t fflfast_simt_visited_sites(const void* kernel, int64_t* out, int64_t capacity) {
  std::vector<int64_t> sites;
  for (const auto& [visitor, visits] : controls.visits)
    for (unsigned site = 0; visitor == kernel && site < kSites; ++site)
      if (visits[site]) sites.push_back(site);
  return copy_out(sites, out, capacity);
}

// Six numbers a launch: kernel, grid, block, cluster, shared bytes, fiber switches.
EXPORTED int64_t fflfast_simt_launches(int64_t* out, int64_t capacity) {
  return copy_out(controls.launches, out, capacity);
}
}

}  // namespace fflfast::simt
