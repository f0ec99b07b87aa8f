// The interface of csrc/cuda/simt.h on the host: what the kernels call, in terms of the emulator (emulator.cpp).
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

namespace fflfast::simt {

namespace emulator {

// The running thread; a fiber sees its own. `shared` is its block's memory.
struct Thread {
  int index;
  int block_size;
  int64_t block;
  int64_t grid_size;
  unsigned rank;
  unsigned cluster_size;
  unsigned char* shared;
};
extern Thread* current;

enum class Scope { kWarp, kBlock, kCluster };

void barrier(Scope scope, int site);
constexpr size_t kSlot = 32;  // the most bytes a lane hands to the others at once
const unsigned char* gather(int site, const void* value, size_t bytes);
void* map_shared(void* local, unsigned rank);
void let_others_run(unsigned odds);
void begin_copy(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int site, int groups_left);
void check_aligned(const void* address, size_t bytes);
float within_bound(double exact, double bound, float x);
int add_site(int site);
void run(const Launch& launch, const void* kernel, void (*body)(void*), void* closure);

// Each site that is compiled in makes itself known when the library is loaded, so that the tests can ask for all.
template <int SITE>
struct Site {
  static const int number;
};
template <int SITE>
const int Site<SITE>::number = add_site(SITE);

}  // namespace emulator

inline int thread_index() { return emulator::current->index; }
inline int block_size() { return emulator::current->block_size; }
inline int64_t block_index() { return emulator::current->block; }
inline int64_t grid_size() { return emulator::current->grid_size; }
inline unsigned cluster_rank() { return emulator::current->rank; }
inline unsigned cluster_size() { return emulator::current->cluster_size; }

template <int SITE>
inline void sync_block() {
  emulator::barrier(emulator::Scope::kBlock, emulator::Site<SITE>::number);
}

template <int SITE>
inline void sync_warp() {
  emulator::barrier(emulator::Scope::kWarp, emulator::Site<SITE>::number);
}

template <int SITE>
inline void sync_cluster() {
  emulator::barrier(emulator::Scope::kCluster, emulator::Site<SITE>::number);
}

template <int SITE, class T>
inline T shuffle_from(T value, int lane) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "lanes exchange 4- or 8-byte numbers");
  const unsigned char* slots = emulator::gather(emulator::Site<SITE>::number, &value, sizeof(T));
  if (slots != nullptr) std::memcpy(&value, slots + (lane & (kWarpSize - 1)) * emulator::kSlot, sizeof(T));
  return value;
}

template <int SITE, class T>
inline T shuffle_xor(T value, int lane_mask) {
  return shuffle_from<SITE>(value, lane_index() ^ lane_mask);
}

template <class T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(emulator::current->shared);
}

template <class T>
inline T* cluster_map(T* local, unsigned rank) {
  return static_cast<T*>(emulator::map_shared(local, rank));
}

// As far from the truth as a GPU's instructions may be, the same for the same input.
inline float exp2_approx(float x) {
  const double exact = std::exp2(static_cast<double>(x));
  return emulator::within_bound(exact, exact * 0x1p-22, x);
}

inline float log2_approx(float x) {
  const double exact = std::log2(static_cast<double>(x));
  return emulator::within_bound(exact, (std::fabs(exact) > 1 ? std::fabs(exact) : 1) * 0x1p-22, x);
}

// Moments at which other threads, also of other blocks, may run before this one goes on: one thread of a block
// counts where all threads fence, so that the odds of a long wait differ.
inline unsigned atomic_inc_wrap(unsigned* address, unsigned limit) {
  emulator::let_others_run(4);
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  emulator::let_others_run(4);
  return old;
}

inline void fence_device() { emulator::let_others_run(64); }

template <int BYTES>
inline void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "an asynchronous copy moves 4, 8 or 16 bytes");
  emulator::begin_copy(shared, global, BYTES);
}

inline void copy_async_commit() { emulator::commit_copies(); }

template <int SITE, int N>
inline void copy_async_wait() {
  emulator::wait_copies(emulator::Site<SITE>::number, N);
}

template <class T, int N>
inline Pack<T, N> load_cached(const T* address) {
  emulator::check_aligned(address, sizeof(Pack<T, N>));
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <class T, int N>
inline Pack<T, N> load_streaming(const T* address) {
  return load_cached<T, N>(address);
}

template <class T, int N>
inline Pack<T, N> load_device(const T* address) {
  return load_cached<T, N>(address);
}

template <class T, int N>
inline void store_streaming(T* address, const Pack<T, N>& pack) {
  emulator::check_aligned(address, sizeof(Pack<T, N>));
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals are multiples of 2^-24
    return float_of_bits(sign | bits_of_float(static_cast<float>(fraction) * 0x1p-24f));
  }
  return float_of_bits(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

// `bits` without its lowest `shift` ones, rounded to nearest, ties to even.
inline uint32_t round_off(uint32_t bits, int shift) {
  return (bits + (1u << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift;
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) {  // from 65520 on, halfway to what would follow the largest half, infinity is nearest
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal half
    half = round_off(magnitude - (112u << 23), 13);
  } else if (magnitude >= 0x33000000) {  // 2^-25: a subnormal, or the tie that goes to zero
    half = round_off((magnitude & 0x7fffff) | 0x800000, 126 - static_cast<int>(magnitude >> 23));
  } else {
    half = 0;
  }
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t float_to_bfloat16(float value) {
  return std::isnan(value) ? 0x7fff : static_cast<uint16_t>(round_off(bits_of_float(value), 16));
}

template <class To, class From>
inline To convert(From value) {
  if constexpr (std::is_same_v<From, Half>) {
    return static_cast<To>(half_to_float(value.bits));
  } else if constexpr (std::is_same_v<From, BFloat16>) {
    return static_cast<To>(float_of_bits(static_cast<uint32_t>(value.bits) << 16));
  } else if constexpr (std::is_same_v<To, Half>) {
    return To{float_to_half(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return To{float_to_bfloat16(static_cast<float>(value))};
  } else {
    return static_cast<To>(value);
  }
}

// Number `half` of a word of two, or a tf32 number: what the tensor cores see of a float.
template <class T>
inline float operand(uint32_t word, int half) {
  if constexpr (sizeof(T) == 2) {
    return convert<float>(T{static_cast<uint16_t>(word >> (16 * half))});
  } else {
    return float_of_bits(word & ~0x1fffu);
  }
}

template <int SITE, class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t held[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* slots = emulator::gather(emulator::Site<SITE>::number, held, sizeof(held));
  if (slots == nullptr) return;
  const int group = lane_index() / 4, columns = lane_index() % 4 * 2;
  for (int upper = 0; upper < 2; ++upper)
    for (int t = 0; t < 4; ++t) {
      uint32_t rows[2], of_columns[2];  // of the lanes that hold this part of K
      std::memcpy(rows, slots + (group * 4 + t) * emulator::kSlot + upper * 8, 8);
      for (int j = 0; j < 2; ++j)
        std::memcpy(&of_columns[j], slots + ((columns + j) * 4 + t) * emulator::kSlot + 16 + upper * 4, 4);
      for (int half = 0; half < kPerWord; ++half)
        for (int n = 0; n < 4; ++n) c[n] += operand<T>(rows[n / 2], half) * operand<T>(of_columns[n % 2], half);
    }
}

template <int SITE, bool TRANSPOSED>
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulator::check_aligned(row, 16);
  // Each lane hands in its row as it is when the lane comes here: one that another lane has yet to write is stale.
  std::memcpy(out, row, sizeof(out));
  const unsigned char* slots = emulator::gather(emulator::Site<SITE>::number, out, sizeof(out));
  if (slots == nullptr) return;
  const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
  for (int j = 0; j < 4; ++j) {
    uint16_t halves[2];
    for (int n = 0; n < 2; ++n) {
      const int line = TRANSPOSED ? pair + n : group, column = TRANSPOSED ? group : pair + n;
      std::memcpy(&halves[n], slots + (8 * j + line) * emulator::kSlot + 2 * column, 2);
    }
    out[j] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_of_float(value);
  return std::isnan(value) ? 0x7fffffff : std::isinf(value) ? bits : (bits + 0x1000) & ~0x1fffu;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((size_t{0} + ... + sizeof(Parameters)) <= 4096, "a kernel takes at most 4 KB of arguments");
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  auto body = [&] { std::apply(kernel, parameters); };
  emulator::run(
      launch, reinterpret_cast<const void*>(kernel),
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
}

inline void* current_stream(int) { return nullptr; }

}  // namespace fflfast::simt
