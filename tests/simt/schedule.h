// Which of the threads that can run is next. Even chances all the time would keep warps abreast of each other, and hide
// what goes wrong where one is far behind; so most launches rank the warps, run the first that can, and change a rank
// now and then. Within a warp it is the same: any lane is next, or in half of the launches the first in a random order.
#pragma once

#include <algorithm>
#include <vector>

#include "control.h"

namespace fflfast::simt::emulator {

class Schedule {
 public:
  void reset(size_t num_warps) {
    constexpr unsigned kIntervals[] = {64, 1024, 1u << 30};
    ready_.assign(num_warps, {});
    active_.clear();
    rank_.resize(num_warps);
    for (int& rank : rank_) rank = any_rank();
    lowest_ = 0;
    even_ = below(4) == 0;
    interval_ = kIntervals[below(3)];
    yields_ = below(4) != 0;
    lanes_even_ = below(2) == 0;
    for (int& rank : lane_rank_) rank = any_rank();
    first_ = kNone;
  }

  bool empty() const { return active_.empty(); }

  void make_ready(int fiber) {
    const int warp = fiber / kWarpSize;
    if (ready_[warp].empty()) {
      active_.push_back(warp);
      first_ = kNone;
    }
    ready_[warp].push_back(fiber);
  }

  // A fence or an atomic is where a warp can be late for another block: in most launches, one in `odds` of those that
  // come there falls behind all others.
  void give_way(int fiber, unsigned odds) {
    if (yields_ && below(odds) == 0) change_rank(fiber / kWarpSize, --lowest_);
    make_ready(fiber);
  }

  int take() {
    if (below(interval_) == 0) change_rank(below(static_cast<unsigned>(rank_.size())), any_rank());
    if (even_ || first_ == kNone) first_ = choose();
    std::vector<int>& lanes = ready_[active_[first_]];
    std::swap(lanes[choose_lane(lanes)], lanes.back());
    const int fiber = lanes.back();
    lanes.pop_back();
    if (lanes.empty()) {
      active_[first_] = active_.back();
      active_.pop_back();
      first_ = kNone;
    }
    return fiber;
  }

  static unsigned below(unsigned limit) { return static_cast<unsigned>(((draw() >> 32) * limit) >> 32); }

 private:
  static constexpr int kNone = -1;

  static int any_rank() { return static_cast<int>(below(1u << 31)); }

  int choose() const {
    if (even_) return static_cast<int>(below(static_cast<unsigned>(active_.size())));
    const auto lower = [this](int a, int b) { return rank_[a] < rank_[b]; };
    return static_cast<int>(std::max_element(active_.begin(), active_.end(), lower) - active_.begin());
  }

  size_t choose_lane(const std::vector<int>& lanes) const {
    if (lanes_even_) return below(static_cast<unsigned>(lanes.size()));
    const auto lower = [this](int a, int b) { return lane_rank_[a % kWarpSize] < lane_rank_[b % kWarpSize]; };
    return static_cast<size_t>(std::max_element(lanes.begin(), lanes.end(), lower) - lanes.begin());
  }

  void change_rank(unsigned warp, int rank) {
    rank_[warp] = rank;
    first_ = kNone;
  }

  std::vector<std::vector<int>> ready_;  // of each warp, its fibers that can run
  std::vector<int> active_;              // the warps that have some
  std::vector<int> rank_;
  int lowest_ = 0;
  int first_ = kNone;  // where in active_ the first warp stands, if that is known
  unsigned interval_ = 1;
  int lane_rank_[kWarpSize] = {};
  bool even_ = true, yields_ = false, lanes_even_ = true;
};

}  // namespace fflfast::simt::emulator
