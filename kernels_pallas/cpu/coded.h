// Pages of eight and four bits: rows are rounded as they are written and become floats as they are
// read. kernels_pallas/paged_attention/codec.py says what the bits mean, and these write the same.
#pragma once

#include <vector>

#include "pages.h"
#include "quantize.h"

namespace jaxserve {

// One layer of pages. Lanes fall into parts with a scale each; without parts, every lane of a head
// has a scale that was calibrated.
struct CodedPages {
  uint8_t* values;  // [P, K, Z, width], or two slots a byte: [P, K, Z / 2, width]
  float* scales;    // [P, scale_rows, Z], the first K * parts of them in use, or [K, width]
  int64_t num_pages, num_heads, page_size, width;
  const int64_t* parts;
  int64_t num_parts, scale_rows;
  bool nibbles;

  bool calibrated() const { return num_parts == 0; }
  bool has(int64_t page) const { return page >= 0 && page < num_pages; }
  int64_t page_of(const int32_t* table, int64_t position) const {
    return table[position / page_size];
  }

  uint8_t* row(int64_t page, int64_t head, int64_t slot) const {
    const int64_t rows = nibbles ? page_size / 2 : page_size;
    const int64_t at = nibbles ? slot / 2 : slot;
    return values + ((page * num_heads + head) * rows + at) * width;
  }
  float* scale(int64_t page, int64_t head, int64_t part, int64_t slot) const {
    return scales + (page * scale_rows + head * num_parts + part) * page_size + slot;
  }

  // Rotates the first lanes of a row, as keys are rotated; its own inverse.
  void turn(float* x, int64_t lanes) const {
    if (!nibbles) return;
    for (int64_t part = 0; part < num_parts && lanes > 0; x += parts[part], lanes -= parts[part++]) {
      const int64_t block = parts[part] & -parts[part];
      for (int64_t i = 0; i < parts[part]; i += block) hadamard(x + i, block);
    }
  }

  // Rounds a row of floats, which it overwrites.
  void put(const int32_t* table, int64_t head, int64_t position, float* x, int8_t* spare) const {
    const int64_t page = page_of(table, position), slot = position % page_size;
    if (!has(page)) return;
    uint8_t* to = row(page, head, slot);
    if (calibrated()) return put_calibrated(to, scales + head * width, x);
    turn(x, width);
    for (int64_t part = 0; part < num_parts; x += parts[part], to += parts[part++]) {
      const int64_t n = parts[part];
      float* step = scale(page, head, part, slot);
      if (nibbles) {
        *step = put_nibbles(to, x, n, slot % 2 != 0);
      } else {
        *step = quantize(x, n, spare).scale;
        std::memcpy(to, spare, n);
      }
    }
  }

  // A row as floats; rotated rows stay so.
  void take(int64_t page, int64_t head, int64_t slot, float* to) const {
    const uint8_t* from = row(page, head, slot);
    if (calibrated()) {
      const float* steps = scales + head * width;
      for (int64_t i = 0; i < width; ++i) to[i] = float(int8_t(from[i])) * steps[i];
      return;
    }
    for (int64_t part = 0; part < num_parts; from += parts[part], to += parts[part++]) {
      const int64_t n = parts[part];
      const float step = *scale(page, head, part, slot);
      const int up = nibbles && slot % 2 == 0 ? 4 : 0, down = nibbles ? 4 : 0;
      for (int64_t i = 0; i < n; ++i) {
        to[i] = float(int8_t(uint8_t(from[i] << up)) >> down) * step;
      }
    }
  }

  void prefetch(const int32_t* table, int64_t head, int64_t position) const {
    const int64_t page = page_of(table, position);
    if (has(page)) prefetch_row(row(page, head, position % page_size), width);
  }

 private:
  // Butterflies in the order of codec.hadamard, so that the bits are the same.
  static void hadamard(float* x, int64_t block) {
    for (int64_t step = 1; step < block; step *= 2) {
      for (int64_t i = 0; i < block; i += 2 * step) {
        for (int64_t j = i; j < i + step; ++j) {
          const float a = x[j], b = x[j + step];
          x[j] = a + b;
          x[j + step] = a - b;
        }
      }
    }
    const float factor = float(1.0 / std::sqrt(double(block)));
    for (int64_t i = 0; i < block; ++i) x[i] *= factor;
  }

  // The largest magnitude becomes -8; a row that is not finite has no finite step.
  static float put_nibbles(uint8_t* to, const float* x, int64_t n, bool high) {
    float most = x[0], least = x[0], zeros = 0;
    for (int64_t i = 0; i < n; ++i) {
      most = std::max(most, x[i]);
      least = std::min(least, x[i]);
      zeros += x[i] - x[i];  // unless one is not finite
    }
    const float top = (most >= -least ? most : least) + zeros;
    const float steps = top != 0 ? -8.0f / top : 0.0f;
    const int shift = high ? 4 : 0;
    for (int64_t i = 0; i < n; ++i) {
      const float whole = std::nearbyint(std::min(7.0f, std::max(-8.0f, x[i] * steps)));
      to[i] = uint8_t((to[i] & (0xF0 >> shift)) | ((uint8_t(int8_t(whole)) & 15) << shift));
    }
    return top * (-1.0f / 8);
  }

  void put_calibrated(uint8_t* to, const float* steps, const float* x) const {
    for (int64_t i = 0; i < width; ++i) {
      const float times = steps[i] > 0 ? 1.0f / steps[i] : 0.0f;
      to[i] = uint8_t(int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, x[i] * times)))));
    }
  }
};

}  // namespace jaxserve
