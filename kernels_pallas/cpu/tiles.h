// Intel's AMX: eight registers of 16 rows of 64 bytes, two of which multiply into a third.
//
// dot<T, S, A, B>() adds to word [i][j] of tile S the product of row i of A with column j of B, where
// a word holds four numbers of eight bits or two of bf16. Sums of integers are exact. Those of bf16
// are taken of either half of the words alone, in order, added to each other, and then to what was
// there; numbers too small to be normal are zero.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(JAXSERVE_EMULATED_TILES) && defined(__AVX512F__)
#define JAXSERVE_TILES
#elif defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define JAXSERVE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxserve {

#if defined(JAXSERVE_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

constexpr int64_t kTileRows = 16, kTileWords = 16, kTileBytes = kTileRows * kTileWords * 4;

#if defined(JAXSERVE_EMULATED_TILES)

// For tests of machines that have none.
inline bool have_tiles() { return true; }

struct Tiles {
  explicit Tiles(bool = true) {}

  static inline thread_local char data[8][kTileBytes];

  template <int tile>
  static void zero() {
    std::memset(data[tile], 0, kTileBytes);
  }
  template <int tile, bool passing = false>
  static void load(const void* from, int64_t stride) {
    for (int i = 0; i < kTileRows; ++i) {
      std::memcpy(data[tile] + 64 * i, static_cast<const char*>(from) + i * stride, 64);
    }
  }
  template <int tile>
  static void store(void* to) {
    std::memcpy(to, data[tile], kTileBytes);
  }
  template <class T, int sum, int a, int b>
  static void dot() {
    for (int64_t i = 0; i < kTileRows * kTileWords; ++i) {
      const int64_t row = i / kTileWords, column = i % kTileWords;
      add<T>(data[sum] + 4 * i, data[a] + 64 * row, data[b] + 4 * column);
    }
  }

 private:
  template <class T>
  static void add(char* to, const char* row, const char* column) {
    constexpr int kPerWord = 4 / sizeof(T);
    using Sum = std::conditional_t<sizeof(T) == 1, int32_t, float>;
    std::array<Sum, kPerWord> sums{};
    for (int64_t word = 0; word < kTileWords; ++word) {
      const auto x = jaxserve::load<std::array<T, kPerWord>>(row + 4 * word);
      const auto y = jaxserve::load<std::array<T, kPerWord>>(column + 64 * word);
      for (int i = 0; i < kPerWord; ++i) {
        if constexpr (sizeof(T) == 1) {
          sums[i] += x[i] * y[i];
        } else {
          sums[i] = std::fma(to_float(x[i]), to_float(y[i]), sums[i]);
        }
      }
    }
    Sum sum = sums[0];
    for (int i = 1; i < kPerWord; ++i) sum += sums[i];
    jaxserve::store(to, jaxserve::load<Sum>(to) + sum);
  }
};

#elif defined(JAXSERVE_TILES)

// A process has to ask Linux for the registers. Where that is refused products are as elsewhere.
inline bool have_tiles() {
  constexpr int kAskForFeature = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
  return granted;
}

// While one of these lives, a thread's tiles are of full size, if it wants them.
class Tiles {
 public:
  explicit Tiles(bool wanted = true) : wanted_(wanted) {
    if (!wanted_) return;
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 4 * kTileWords;
      config.rows[i] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (wanted_) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;

  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // `passing`: what is not looked at again before much else is.
  template <int tile, bool passing = false>
  static void load(const void* from, int64_t stride) {
    if constexpr (passing) {
      asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride), "i"(tile)
                   : "memory");
    } else {
      asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
    }
  }
  template <int tile>
  static void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64l), "i"(tile) : "memory");
  }
  template <class T, int sum, int a, int b>
  static void dot() {
    if constexpr (sizeof(T) == 1) {
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    } else {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    }
  }

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  const bool wanted_;
};

#else

constexpr bool have_tiles() { return false; }

// Never called: what is made of tiles compiles without them, and is dropped.
struct Tiles {
  explicit Tiles(bool = true) {}

  template <int>
  static void zero() {}
  template <int, bool = false>
  static void load(const void*, int64_t) {}
  template <int>
  static void store(void*) {}
  template <class, int, int, int>
  static void dot() {}
};

#endif

}  // namespace jaxserve
