// One block of keys for many rows of queries, by tiles all the way. Sixteen queries are the columns
// of every tile: softmax goes down them, register by register, and what it leaves is an operand of
// the next product as it lies.
#pragma once

#include "attention.h"

namespace jaxserve {

// A block of keys, as they lie, and its values, turned: a row for each of their lanes. All rows of
// queries share them.
struct BlockTiles {
  const char* keys[kBlockKeys / kTileRows];
  int64_t key_stride;  // in bytes

  BlockTiles(const Attention<bf16>& job, const Work<bf16>& work, const Context<bf16>& now,
             const Context<bf16>& next)
      : key_stride(job.keys.width * int64_t(sizeof(bf16))) {
    const int64_t width = job.keys.width, count = round_up(now.keys.count, kPairRows);
    for (int64_t key = 0; key < count; key += kTileRows) {
      const Run<bf16> run = run_of(now.keys, key, width, work.keys + key * width);
      keys[key / kTileRows] = reinterpret_cast<const char*>(run.rows);
      for (int64_t i = key; i < key + kTileRows; ++i) prefetch_row(next.keys.rows[i], width);
    }
    const int64_t padded = job.padded_values();
    pack_values(now.values, next.values, count, job.value_dim, padded, work.values);
    for (int64_t key = 0; key < count; key += 2 * kTileWords) {
      for (int64_t lane = 0; lane < padded; lane += kTileRows) {
        bf16* to = work.turned + lane * kBlockKeys + key;
        transpose_lines(work.values + key * padded + 2 * lane, 4 * padded,
                        [&](int64_t i, U words) { store(to + i * kBlockKeys, words); });
      }
    }
  }
};

// Two groups of sixteen rows of a stretch and one block of keys: first all scores by tiles, then
// softmax by registers, then values by tiles. The two share what multiplies: for 500 cycles after an
// instruction for tiles registers have half of it. A pause of 2,000 sends tiles to sleep, and waking
// them takes 800. Hence this many rows between one and the other.
class RowPair {
 public:
  RowPair(const Attention<bf16>& job, const Stretch& stretch, const Work<bf16>& work, int64_t row)
      : job_(job),
        stretch_(stretch),
        work_(work),
        row_(row),
        num_rows_(std::min(kPairRows, stretch.num_rows - row)),
        padded_(job.padded_values()) {}

  void attend(const Context<bf16>& now, const BlockTiles& block) const {
    Span first, last;  // from one to the other rows see later keys
    see(job_, stretch_, now, row_, 1, &first);
    see(job_, stretch_, now, row_ + num_rows_ - 1, 1, &last);
    const int64_t keys = round_up(last.end, kPairRows);
    if (keys <= 0) return;
    score(block, keys);
    if (last.begin <= 0 && first.end >= keys) {
      for (int64_t i = 0; i < kPairRows; i += kTileRows) weigh(nullptr, keys, i);
    } else {
      Span seen[kPairRows];
      see(job_, stretch_, now, row_, num_rows_, seen);
      std::fill(seen + num_rows_, seen + kPairRows, last);
      for (int64_t i = 0; i < kPairRows; i += kTileRows) weigh(seen + i, keys, i);
    }
    add_values(keys);
  }

 private:
  static constexpr int64_t kGroupScores = kBlockKeys * kTileRows;

  float* scores(int64_t i) const { return work_.scores + i * kBlockKeys; }
  bf16* weights(int64_t i) const { return work_.weights + i * kBlockKeys; }
  float* sums(int64_t i) const { return work_.sums + (row_ + i) * padded_; }

  void score(const BlockTiles& block, int64_t keys) const {
    const int64_t words = words_of<bf16>(job_.keys.width);
    const char* group = work_.groups + row_ / kTileRows * group_bytes(words);
    for (int64_t key = 0; key < keys; key += kPairRows) {
      const char* const* rows = block.keys + key / kTileRows;
      multiply_block<2, false>({{rows[0], rows[1]},
                                block.key_stride,
                                {group, group + group_bytes(words)},
                                {scores(0) + key * kLanes, scores(kTileRows) + key * kLanes}},
                               words);
    }
  }

  // Scores of sixteen rows from the i-th on become weights; sums shrink as they have to.
  void weigh(const Span* seen, int64_t keys, int64_t i) const {
    const Columns columns{work_.base + row_ + i, work_.total + row_ + i};
    const F shrink = columns.add(seen, keys, job_.scores, scores(i), weights(i));
    if (!any(shrink != splat(1.0f))) return;
    float* to = sums(i);
    for (int64_t lane = 0; lane < padded_; ++lane, to += kLanes) store(to, load<F>(to) * shrink);
  }

  void add_values(int64_t keys) const {
    const char* first = reinterpret_cast<const char*>(weights(0));
    const char* second = reinterpret_cast<const char*>(weights(kTileRows));
    for (int64_t lane = 0; lane < padded_; lane += kPairRows) {
      const char* rows = reinterpret_cast<const char*>(work_.turned + lane * kBlockKeys);
      const int64_t stride = kBlockKeys * int64_t(sizeof(bf16));
      const TileBlock tiles{{rows, rows + kTileRows * stride},
                            stride,
                            {first, second},
                            {sums(0) + lane * kLanes, sums(kTileRows) + lane * kLanes}};
      if (padded_ - lane > kTileRows) {
        multiply_block<2, true>(tiles, keys / 2);
      } else {
        multiply_block<1, true>(tiles, keys / 2);
      }
    }
  }

  const Attention<bf16>& job_;
  const Stretch& stretch_;
  const Work<bf16>& work_;
  const int64_t row_, num_rows_, padded_;
};

// Adds one block of keys to every row of a stretch.
inline void attend_columns(const Attention<bf16>& job, const Stretch& stretch,
                           const Work<bf16>& work, const Context<bf16>& now,
                           const Context<bf16>& next) {
  const BlockTiles block(job, work, now, next);
  for (int64_t row = 0; row < stretch.num_rows; row += kPairRows) {
    RowPair(job, stretch, work, row).attend(now, block);
  }
}

}  // namespace jaxserve
