// Groups of images whose activated rows, a = relu(z), exist at a time, as the products of the pointwise weight want a
// as a matrix.
#pragma once

#include "fusion_arguments.h"
#include "fusion_products.h"

namespace fflfast {

// Which images go together follows from shapes alone, as sums depend on it.
struct Groups {
  int64_t images;  // in a group; the last one may have fewer
  int64_t count;
  bool apart;  // each group on one thread, else one after the other on all threads
};

// Where the weight is small and the rows are many, a group stays in one core's second-level cache from the first step
// to the last. Else groups of 4 MB, but of enough rows for an efficient product. Sets the plan's chunks to fit.
inline Groups make_groups(FusionPlan* plan, int64_t columns) {
  constexpr int64_t kRows = 512, kManyGroups = 256, kSmallWeight = int64_t{1} << 18, kPartNumbers = int64_t{1} << 22;
  constexpr int64_t kLargeNumbers = int64_t{1} << 20, kLargeRows = 2048;
  const int64_t rows = plan->batch * plan->pixels(), weight = columns * plan->channels;
  Groups groups{};
  // Fours divide well among threads. Each group has a gradient of the weight of its own for a while.
  int64_t count = clamp(rows / kRows / 4 * 4, 1, clamp(kPartNumbers / weight, 1, kManyGroups));
  groups.apart = weight <= kSmallWeight && count >= 8 && plan->batch >= 8;
  if (!groups.apart) count = ceil_div(rows, clamp(kLargeNumbers / plan->channels, kLargeRows, rows));
  groups.images = ceil_div(plan->batch, count);
  groups.count = ceil_div(plan->batch, groups.images);
  plan->images_per_chunk = ceil_div(groups.images, ceil_div(groups.images, plan->images_per_chunk));
  groups.images = ceil_div(groups.images, plan->images_per_chunk) * plan->images_per_chunk;
  groups.count = ceil_div(plan->batch, groups.images);
  return groups;
}

// Calls body(group, first image, the plan of its images); on a group's own thread all that it starts runs there too.
template <class Body>
inline void for_each_group(const FeatureArguments& a, const Groups& groups, const Body& body) {
  const auto task = [&](int64_t k) {
    const int64_t first = k * groups.images;
    body(k, first, a.part(first, clamp(a.plan.batch - first, 1, groups.images)));
  };
  if (groups.apart) return run_tasks(groups.count, task);
  for (int64_t k = 0; k < groups.count; ++k) task(k);
}

}  // namespace fflfast
