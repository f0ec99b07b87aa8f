// A small SIMT machine. Each thread of the resident clusters is a fiber with a stack of its own; barriers, warp
// intrinsics, fences and atomics are the moments at which another fiber may run, and which one does is drawn at random
// from a seed. What a GPU leaves undefined is made wrong here: shared memory holds NaN before a block's first
// instruction and after its last, and the destination of an asynchronous copy holds NaN until the wait.
//
// One launch at a time, on the caller's thread; "device memory" is the host's.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"
#include "control.h"
#include "schedule.h"

namespace fflfast::simt::emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kStride = kStack + 13 * 64;  // the tops of the stacks must not all fall into one set of the cache
constexpr uint64_t kStackEnd = 0x5354414b454e4421;  // written to the end of each stack, gone where a kernel needs more
constexpr size_t kMargin = 256;                     // poison on both sides of a block's shared memory
constexpr unsigned char kPoison = 0xff;             // NaN in every float type, -1 in every integer
constexpr int kMostThreadsAtOnce = 4096;            // beyond this one cluster is resident at a time

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;
};

// Waiting threads of one warp, block or cluster. The values that lanes exchange are double-buffered: a lane can enter
// the next exchange while another has not read the last one's, but not the one after.
struct Gate {
  int first = 0, size = 0;  // its fibers
  int waiting = 0, site = 0;
  unsigned round = 0;
  unsigned char slots[2][kWarpSize][kSlot];
};

struct Fiber : Thread {
  Context context;
  unsigned char* stack;
  Gate* gate[3];  // by Scope
  int cluster_slot, block_slot;
  std::vector<std::vector<Copy>> copies;  // groups in order; the last one is open
};

struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  int unfinished = 0;
  bool started = false;
};

struct Machine {
  Launch launch;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Gate> warps, blocks, clusters;
  std::vector<Block> memories;
  Schedule schedule;
  Context scheduler;
  int running = -1;
  std::string failure;
  unsigned char* stacks = nullptr;
  size_t num_stacks = 0;
  int64_t switches = 0;
} machine;

constexpr const char* kScopeName[] = {"warp", "block", "cluster"};

std::string where(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block);
}

void leave() { Context::change(machine.fibers[machine.running].context, machine.scheduler); }

// Ends the launch. Comes back never: nothing in a kernel has a destructor that matters.
[[noreturn]] void fail(const std::string& what) {
  machine.failure = where(machine.fibers[machine.running]) + ": " + what;
  for (;;) leave();
}

void enter_fiber() {
  try {
    machine.body(machine.closure);
  } catch (const std::exception& error) {
    machine.failure = std::string("a kernel threw: ") + error.what();
  }
  machine.running = ~machine.running;  // tells the scheduler that this one has ended
  Context::change(machine.fibers[~machine.running].context, machine.scheduler);
}

void poison(Block& block) { std::fill(block.memory.begin(), block.memory.end(), kPoison); }

bool margins_untouched(const Block& block) {
  const auto untouched = [](unsigned char byte) { return byte == kPoison; };
  const unsigned char* end = block.shared + machine.launch.shared;
  return std::all_of(block.shared - kMargin, block.shared, untouched) && std::all_of(end, end + kMargin, untouched);
}

void allocate_stacks(size_t count) {
  if (count <= machine.num_stacks) return;
  if (machine.stacks != nullptr) munmap(machine.stacks, machine.num_stacks * kStride);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error("SIMT emulation: no memory for " + std::to_string(count) + " stacks");
  machine.stacks = static_cast<unsigned char*>(memory);
  machine.num_stacks = count;
}

// Room for `slots` resident clusters.
void prepare(int slots) {
  const int block = machine.launch.block, cluster = machine.launch.cluster, threads = slots * cluster * block;
  allocate_stacks(threads);
  const auto gates = [](std::vector<Gate>& list, int count, int size) {
    list.assign(count, Gate{});
    for (int i = 0; i < count; ++i) list[i].first = i * size, list[i].size = size;
  };
  gates(machine.warps, threads / kWarpSize, kWarpSize);
  gates(machine.blocks, slots * cluster, block);
  gates(machine.clusters, slots, cluster * block);
  machine.memories.resize(slots * cluster);
  for (Block& memory : machine.memories) {
    memory.memory.resize(machine.launch.shared + 2 * kMargin + 128);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.memory.data()) + kMargin;
    memory.shared = reinterpret_cast<unsigned char*>((start + 127) & ~uintptr_t{127});
    poison(memory);
  }
  machine.schedule.reset(machine.warps.size());
  machine.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.stack = machine.stacks + i * kStride;
    fiber.block_slot = i / block;
    fiber.cluster_slot = i / (block * cluster);
    fiber.index = i % block;
    fiber.block_size = block;
    fiber.grid_size = machine.launch.grid;
    fiber.rank = static_cast<unsigned>(fiber.block_slot % cluster);
    fiber.cluster_size = static_cast<unsigned>(cluster);
    fiber.shared = machine.memories[fiber.block_slot].shared;
    fiber.gate[0] = &machine.warps[i / kWarpSize];
    fiber.gate[1] = &machine.blocks[fiber.block_slot];
    fiber.gate[2] = &machine.clusters[fiber.cluster_slot];
  }
}

void start_cluster(int slot, int64_t cluster) {
  const Launch& launch = machine.launch;
  for (int r = 0; r < launch.cluster; ++r) {
    machine.memories[slot * launch.cluster + r].unfinished = launch.block;
    machine.memories[slot * launch.cluster + r].started = false;
  }
  for (int i = slot * launch.cluster * launch.block; i < (slot + 1) * launch.cluster * launch.block; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.block = cluster * launch.cluster + fiber.rank;
    fiber.copies.assign(1, {});
    std::copy_n(reinterpret_cast<const unsigned char*>(&kStackEnd), sizeof(kStackEnd), fiber.stack);
    fiber.context.prepare(fiber.stack, kStack, enter_fiber);
    machine.schedule.make_ready(i);
  }
}

std::string describe_deadlock() {
  const std::vector<Gate>* gates[] = {&machine.warps, &machine.blocks, &machine.clusters};
  for (int scope = 0; scope < 3; ++scope)
    for (const Gate& gate : *gates[scope])
      if (gate.waiting > 0)
        return "deadlock: " + std::to_string(gate.waiting) + " of " + std::to_string(gate.size) + " threads of a " +
               kScopeName[scope] + " wait at site " + std::to_string(gate.site) + ", first " +
               where(machine.fibers[gate.first]) + "; the others have ended or wait elsewhere";
  return "deadlock";
}

// Runs one fiber until it waits or ends; true when it was the last of its cluster.
bool step(int index) {
  Fiber& fiber = machine.fibers[index];
  Block& block = machine.memories[fiber.block_slot];
  if (!block.started) {
    block.started = true;
    poison(block);
  }
  machine.running = index;
  current = &fiber;
  ++machine.switches;
  Context::change(machine.scheduler, fiber.context);
  if (!std::equal(fiber.stack, fiber.stack + sizeof(kStackEnd), reinterpret_cast<const unsigned char*>(&kStackEnd)))
    machine.failure = where(fiber) + " needs more than " + std::to_string(kStack) + " bytes of stack";
  if (machine.running == index || !machine.failure.empty()) return false;
  if (--block.unfinished > 0) return false;
  if (!margins_untouched(block))
    machine.failure = "block " + std::to_string(fiber.block) + " wrote outside its " +
                      std::to_string(machine.launch.shared) + " bytes of shared memory";
  poison(block);
  const auto first = machine.memories.begin() + fiber.cluster_slot * machine.launch.cluster;
  return std::all_of(first, first + machine.launch.cluster, [](const Block& b) { return b.unfinished == 0; });
}

void check_launch(const Launch& launch) {
  const DeviceProperties& device = device_properties(0);
  const auto refuse = [](const std::string& what) { throw std::runtime_error("SIMT emulation: expected " + what); };
  if (launch.grid < 1 || launch.grid > 0x7fffffff) refuse("1 to 2^31-1 blocks, got " + std::to_string(launch.grid));
  if (launch.block < 1 || launch.block > 1024 || launch.block % kWarpSize != 0)
    refuse("32 to 1024 threads in whole warps, got " + std::to_string(launch.block));
  if (launch.cluster < 1 || launch.cluster > (device.capability >= 90 ? 16 : 1) || launch.grid % launch.cluster != 0)
    refuse("a cluster of 1 to 16 blocks (1 before sm_90) that divides the grid of " + std::to_string(launch.grid) +
           ", got " + std::to_string(launch.cluster));
  if (launch.shared > device.shared_per_block)
    refuse("at most " + std::to_string(device.shared_per_block) + " bytes of shared memory a block, got " +
           std::to_string(launch.shared));
}

}  // namespace

void barrier(Scope scope, int site) {
  if (is_skipped(site)) return;
  Gate& gate = *machine.fibers[machine.running].gate[static_cast<int>(scope)];
  if (gate.waiting > 0 && gate.site != site)
    fail(std::string("threads of one ") + kScopeName[static_cast<int>(scope)] + " wait at different sites, " +
         std::to_string(gate.site) + " and " + std::to_string(site));
  gate.site = site;
  if (++gate.waiting == gate.size) {
    gate.waiting = 0;
    ++gate.round;
    for (int i = gate.first; i < gate.first + gate.size; ++i) machine.schedule.make_ready(i);
  }
  leave();
}

// What each lane of the warp hands in, kSlot bytes apart; null where the site is skipped.
const unsigned char* gather(int site, const void* value, size_t bytes) {
  if (is_skipped(site)) return nullptr;
  Fiber& self = machine.fibers[machine.running];
  Gate& gate = *self.gate[static_cast<int>(Scope::kWarp)];
  auto& slots = gate.slots[gate.round & 1];
  std::memcpy(slots[self.index % kWarpSize], value, bytes);
  barrier(Scope::kWarp, site);
  return slots[0];
}

void let_others_run(unsigned odds) {
  machine.schedule.give_way(machine.running, odds);
  leave();
}

void* map_shared(void* local, unsigned rank) {
  const Fiber& self = machine.fibers[machine.running];
  const ptrdiff_t offset = static_cast<unsigned char*>(local) - self.shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(machine.launch.shared) || rank >= self.cluster_size)
    fail("cluster_map expects an address in the block's shared memory and a rank below " +
         std::to_string(self.cluster_size) + ", got offset " + std::to_string(offset) + " and rank " +
         std::to_string(rank));
  return machine.memories[self.cluster_slot * machine.launch.cluster + static_cast<int>(rank)].shared + offset;
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes is not aligned to its size");
}

void begin_copy(void* shared, const void* global, int bytes) {
  check_aligned(shared, bytes);
  check_aligned(global, bytes);
  auto* destination = static_cast<unsigned char*>(shared);
  std::fill_n(destination, bytes, kPoison);
  auto& group = machine.fibers[machine.running].copies.back();
  group.push_back({destination, static_cast<const unsigned char*>(global), bytes});
}

void commit_copies() { machine.fibers[machine.running].copies.emplace_back(); }

void wait_copies(int site, int groups_left) {
  if (is_skipped(site)) return;
  auto& groups = machine.fibers[machine.running].copies;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) std::copy_n(copy.global, copy.bytes, copy.shared);
    groups.erase(groups.begin());
  }
}

void run(const Launch& launch, const void* kernel, void (*body)(void*), void* closure) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(launch);
  begin_launch(kernel);
  machine.launch = launch;
  machine.body = body;
  machine.closure = closure;
  machine.failure.clear();
  machine.switches = 0;
  const int64_t num_clusters = launch.grid / launch.cluster;
  const int threads = launch.block * launch.cluster;
  const int resident = resident_clusters() * threads > kMostThreadsAtOnce ? 1 : resident_clusters();
  const int slots = static_cast<int>(std::min<int64_t>(num_clusters, resident));
  prepare(slots);
  std::vector<int64_t> order(num_clusters);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = num_clusters - 1; i > 0; --i)
    std::swap(order[i], order[Schedule::below(static_cast<unsigned>(i) + 1)]);
  int64_t next = 0;
  while (next < slots) start_cluster(static_cast<int>(next), order[next]), ++next;
  while (!machine.schedule.empty() && machine.failure.empty()) {
    const int index = machine.schedule.take();
    if (step(index) && next < num_clusters) start_cluster(machine.fibers[index].cluster_slot, order[next++]);
  }
  const auto unfinished = [](const Block& block) { return block.unfinished > 0; };
  if (machine.failure.empty() && std::any_of(machine.memories.begin(), machine.memories.end(), unfinished))
    machine.failure = describe_deadlock();
  current = nullptr;
  end_launch(launch, machine.switches);
  if (!machine.failure.empty()) throw std::runtime_error("SIMT emulation: " + machine.failure);
}

}  // namespace fflfast::simt::emulator
