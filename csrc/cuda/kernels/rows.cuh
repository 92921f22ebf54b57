// Losses of rows of logits on CUDA: a team of threads for each row, value and gradient in one kernel.
//
// Device memory is read once and written once. A team is one thread where classes are strided, 8 to 32
// threads for short rows, a block for long ones. The most common losses hold a row of up to 32 KB in
// registers. Longer rows go to persistent blocks: what fits of a row stays in shared memory, a little in
// registers, and while its gradient is written asynchronous copies bring the next row into the slots that
// become free; only what does not fit is read twice, the second time from L2. The most common losses divide
// a row of more than 384 KB into 2 or 4 parts, and a cluster of as many persistent blocks keeps a part in each;
// a device without clusters takes one part after the other in one block, and so do rows that do not start on
// 16 bytes, or whose gradient is not written.
//
// Each thread has a running maximum and sums; they are merged, first within a part, in an order that depends
// on the row's length alone, so results depend neither on the batch nor on alignment nor on the device. No
// softmax is stored. The backward pass has separate kernels: it has no sums, and may take many rows with few
// blocks.
//
// row_sums.cuh      maximum and sums, and how a team merges them
// row_reader.cuh    a row as one thread sees it
// row_staying.cuh   the part of a long row that a persistent block keeps on the chip
// row_held.cuh      a short row in registers
// row_tile.cuh      rows with strided classes by way of shared memory
// row_sweeps.cuh    sweeps over device memory
// row_extras.cuh    several outputs, log-probabilities of chosen classes, number tokens
// row_parts.cuh     the sums of a row in parts, by one block or by a cluster
// here              a row from its first load to its gradient, and the choice of a team for it
#pragma once
#include "row_parts.cuh"
#include "row_tile.cuh"

namespace fastloss::cuda {

template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
struct RowTeam : RowOfParts<Loss, T, kTeam, kBackward, kCluster> {
  using Base = RowOfParts<Loss, T, kTeam, kBackward, kCluster>;
  using Base::a, Base::loss, Base::x, Base::r, Base::t, Base::lane, Base::scale, Base::slots, Base::unit;
  using Base::add_small, Base::write_row, Base::write_zeros, Base::number_term, Base::number_gradient;
  using Base::classes, Base::kParts, Base::before, Base::of_team, Base::sweep_each_part, Base::sweep_cluster;
  using Base::in_tile, Base::stays, Base::x_stride, Base::outputs, Base::upstream, Base::write_index_logps,
      Base::write_index_gradient, Base::refill_all;
  using Base::kHold, Base::kStay, Base::u_of, Base::hold, Base::sums_of, Base::sums_in_turn, Base::sweep;
  using typename Base::R, typename Base::Slope, typename Base::Kept, typename Base::Held;

  __device__ __forceinline__ R
  m_of(R top) const {  // rounded as `logit` is: a class in index may be the maximum
    return product(top, unit.of_z);
  }
  __device__ __forceinline__ T* gradient() const {
    if (in_tile()) return const_cast<T*>(x);
    return static_cast<T*>(a.dx) + a.dx_layout.start(r) + before();
  }
  // Computed where it is needed: an address kept for later would take two registers.
  __device__ __forceinline__ R* state() const { return static_cast<R*>(a.state) + r * a.state_width; }
  // `turn`: where a cluster exchanges sums, 0 or 1. Says whether it did; all of its blocks say the same.
  __device__ __forceinline__ bool run(int turn) {
    const bool leader = lane == 0 && (!kCluster || cluster_rank() == 0);
    t = a.target ? a.target[r] : -1;
    R k = 1;
    bool inside = true;  // a class that does not exist gives NaN and is never used as an index
    if constexpr (kBackward) {
      k = state()[2];
    } else {
      if (a.row_weight) k = static_cast<const R*>(a.row_weight)[r];
      if (a.target && t == a.ignore_index) k = 0;
    }
    if (a.target && (t < 0 || t >= a.n)) {
      inside = false;
      t = -1;
      if (k != 0) k = NAN;
    }
    if constexpr (!kBackward)
      if (a.target && inside && a.class_weight && loss.weighed_by_class() &&
          static_cast<const R*>(a.class_weight)[t] == 0 && !(a.norm && *static_cast<const R*>(a.norm) == 0))
        k = 0;
    if (k == 0) {
      if (!kBackward && leader) {
        for (int64_t i = 0; i < a.state_width; ++i) state()[i] = 0;
        if constexpr (Loss::kOutputs) {
          for (int64_t i = 0; i < a.num_outputs; ++i) outputs()[i] = 0;
        } else {
          static_cast<R*>(a.loss)[r] = 0;
        }
      }
      if constexpr (kCluster)
        __syncthreads();  // hazard in place: other threads copy from here to their slots
      if (a.dx) write_zeros(gradient());
      if (stays()) refill_all();
      return false;
    }
    // unaligned rows: loading as many vectors would take too many registers
    const bool holds = kHold && (kTeam <= 32 || reinterpret_cast<uintptr_t>(x) % 16 == 0);
    const bool write_held =
        holds && a.dx && a.dx_layout.class_stride == 1 && reinterpret_cast<uintptr_t>(gradient()) % 16 == 0;
    Held held;
    if constexpr (kHold > 0)
      if (holds) hold(held);
    Kept kept;
    Target<R> target{a.target != nullptr, 0, 1};
    R vt = 0, ut = 0, top = 0;
    if (a.target && inside) {
      vt = widen(x[(t - before()) * x_stride()]);
      ut = u_of(vt);
      if (a.class_weight) target.weight = static_cast<const R*>(a.class_weight)[t];
    }
    t -= before();
    typename Base::FirstToken token;
    if constexpr (Loss::kNumberTokens) token = this->load_first_token();
    RowState<R> row;
    [[maybe_unused]] R dense_coef = 0;  // of number tokens
    R g = 1;
    if constexpr (kBackward) {
      top = state()[0];
      row.log_sum = state()[1];
#pragma unroll
      for (int i = 0; i < Loss::kSaved; ++i) row.saved[i] = state()[3 + i];
      row.m = m_of(top);
      target.d = unit.distance(ut - top);
      if constexpr (Loss::kNumberTokens) {
        if constexpr (kTeam > 32) __syncthreads();  // hazard: others may still read what the last row kept
        this->keep_number(token);
        if constexpr (kTeam > 32) __syncthreads();  // there has been no reduction
        dense_coef = number_term(row).dense_coef;
      }
      if constexpr (!Loss::kOutputs) g = upstream_of<T>(a, r);
    } else {
      Online<Loss, R> o;
      if constexpr (kCluster) {
        o = sweep_cluster(kept, turn);
      } else if constexpr (kParts) {
        o = sweep_each_part(kept);
      } else if constexpr (kHold > 0 && kTeam <= 32) {
        o = sums_of(held);
      } else {
        o = holds ? sums_in_turn(held) : sweep(kept, 0, classes());
        if constexpr (Loss::kNumberTokens) this->keep_number(token);
        o = of_team(o);
      }
      if (a.target && add_small(o, before())) {
        if constexpr (kCluster) cluster_sync();  // hazard in place: other blocks overwrite what was read
      }
      top = o.base();
      row.m = m_of(top);
      target.d = unit.distance(ut - top);
      const R e = a.target ? unit.exp_of(ut - top) : R(0);
      row.log_sum = log(o.s + e);
      R value = loss.project(row, o.extra, o.s, e, target);
      if constexpr (Loss::kNumberTokens) {
        const auto number = number_term(row);
        value += number.value;
        dense_coef = number.dense_coef;
      }
      value *= k;
      if (a.norm) k /= *static_cast<const R*>(a.norm);
      if constexpr (Loss::kOutputs) write_index_logps(row);
      if (leader) {
        if constexpr (Loss::kOutputs) {
          loss.write(row, outputs());
        } else {
          static_cast<R*>(a.loss)[r] = value;
        }
        R* const saved = state();
        saved[0] = top;
        saved[1] = row.log_sum;
        saved[2] = k;
#pragma unroll
        for (int i = 0; i < Loss::kSaved; ++i) saved[3 + i] = row.saved[i];
        for (int64_t i = 3 + Loss::kSaved; i < a.state_width; ++i) saved[i] = 0;
      }
    }
    if constexpr (Loss::kOutputs && !kBackward) return true;  // a backward pass alone writes a gradient
    if (!a.dx) return true;
    T* dx = gradient();
    if constexpr (Loss::kOutputs) {
      const Slope s{loss.grad_coef(row, upstream(), a.num_index, scale), row.m, row.log_sum, top,
                    unit.kept(row.log_sum)};
      write_row(s, dx, held, write_held, kept);
      write_index_gradient(s, dx);
    } else {
      Slope s{loss.grad_coef(row, target, g * k * scale), row.m, row.log_sum, top, unit.kept(row.log_sum)};
      if constexpr (Loss::kNumberTokens) {
        loss.add(s.coef, g * k * scale, dense_coef);
        this->keep_for_gradient(row.log_sum, g * k * scale);
      }
      if (a.target && inside) s.at_target = this->template slope_at<true>(s, t, vt);
      write_row(s, dx, held, write_held, kept);
      if constexpr (Loss::kNumberTokens) number_gradient(s, dx);
    }
    return true;
  }
};

// Minimum of resident blocks on a multiprocessor, for __launch_bounds__. Number tokens need more registers; in
// the kernels of the longest rows the compiler gets by.
template <class Loss, class T, int kTeam, bool kBackward>
consteval int min_blocks() {
  constexpr int kThreadsOfAll = kResident<Loss, kBackward>;
  if (kHeld<Loss, T, kTeam, kBackward>) return kTeam <= 32 ? 6 : (kThreadsOfAll == 1024 ? 768 : 640) / kTeam;
  if (kTeam <= 32) return Loss::kNumberTokens && sizeof(T) == 8 ? 2 : 4;
  return (Loss::kNumberTokens && kTeam < 1024 ? 512 : kThreadsOfAll) / kTeam;
}
template <class Loss, class T, int kTeam, bool kBackward>
constexpr int kBlocks = min_blocks<Loss, T, kTeam, kBackward>();

// With `slots` > 0 blocks are persistent: each takes another row as soon as it has written one. With kCluster
// each cluster does.
template <class Loss, class T, int kTeam, bool kBackward, bool kCluster>
__device__ __forceinline__ void take_rows(const RowArgs& a, int slots) {
  using R = acc_t<T>;
  constexpr int kBlock = kTeam > 32 ? kTeam : kThreads;
  if (kBackward && a.skip_unit_upstream && upstream_of<T>(a, 0) == 1) return;
  FL_DYN_SHARED(Vec<T>, cache);
  const int lane = threadIdx.x % kTeam;
  const T* const all = static_cast<const T*>(a.x);
  const R scale = R(a.logit_scale);
  const bool capped = Loss::kSoftcap && a.softcap > 0;
  const Unit<R> unit(capped ? R(1) : scale < 0 ? -scale : scale);
  int64_t r = (int64_t{blockIdx.x} * kBlock + threadIdx.x) / kTeam, n = a.n, before = 0;
  int64_t step = int64_t{gridDim.x} * (kBlock / kTeam);
  if constexpr (kCluster) {
    const unsigned blocks = parts_of(a.n * int64_t{sizeof(T)});
    r = blockIdx.x / blocks;
    step = gridDim.x / blocks;
    const int64_t each = part_classes<T>(a.n);
    before = each * cluster_rank();
    n = each < a.n - before ? each : a.n - before;
    cluster_sync();  // no block writes to a peer before that has started
  }
  const auto team = [&](int64_t r, int64_t step, const T* x) {
    const T* q = a.q ? static_cast<const T*>(a.q) + a.q_layout.start(r) : nullptr;
    return RowTeam<Loss, T, kTeam, kBackward, kCluster>{a,
                                                        Loss(a.hparams, a.n),
                                                        lane,
                                                        r,
                                                        x,
                                                        q,
                                                        -1,
                                                        scale,
                                                        R(a.softcap),
                                                        R(a.softcap > 0 ? 1 / a.softcap : 0),
                                                        unit,
                                                        scale < 0,
                                                        cache,
                                                        slots,
                                                        slots && r + step < a.rows,
                                                        a.x_layout.start(r + step) - a.x_layout.start(r),
                                                        n};
  };
  constexpr bool kStay = kStays<Loss, T, kTeam, kBackward>;
  if constexpr (kStay)
    if (slots) {
      const T* const x = all + a.x_layout.start(r) + before;
      for (int slot = lane; slot < slots; slot += kTeam)
        __pipeline_memcpy_async(cache + slot, x + int64_t{slot} * Vec<T>::kSize, 16);
      __pipeline_commit();
    }
  constexpr bool kTile = kTiles<Loss, kTeam>;
  int turn = 0;
  // For whole teams, with a tile for whole blocks.
#pragma unroll 1
  for (; (kTile ? r - threadIdx.x : r) < a.rows; r += step) {
    if (kTile && slots) {
      load_tile(cache, a, r - threadIdx.x);
      if (r < a.rows) team(r, step, reinterpret_cast<const T*>(cache) + threadIdx.x).run(0);
    } else if (!kTile || r < a.rows) {
      turn ^= team(r, step, all + a.x_layout.start(r) + before).run(turn);
    }
    if constexpr (kTile)
      if (slots && a.dx) store_tile(cache, a, r - threadIdx.x);
    // hazard: shared memory is reused; in a cluster its barrier is between
    if constexpr (!kCluster && (kStay || (kTile && kBackward))) __syncthreads();
    if constexpr (!kBackward && !kStay) return;
  }
}
template <class Loss, class T, int kTeam, bool kBackward>
__global__ void __launch_bounds__(kTeam > 32 ? kTeam : kThreads, kBlocks<Loss, T, kTeam, kBackward>)
    rows_kernel(RowArgs a, int slots) {
  take_rows<Loss, T, kTeam, kBackward, false>(a, slots);
}
// A row for a cluster, whose size is the row's number of parts.
template <class Loss, class T>
__global__ void __launch_bounds__(1024, 1) row_clusters_kernel(RowArgs a, int slots) {
  if constexpr (kHasClusters) take_rows<Loss, T, 1024, false, true>(a, slots);
}

// The longest rows, in bytes, for a warp, a block of 128 threads, and one of half a multiprocessor's threads,
// where rows are not held; longer ones get a block of all its threads.
constexpr int64_t kWarpRowBytes = 4 << 10, kBlockRowBytes = 16 << 10, kHalfRowBytes = 128 << 10;
// Bytes of shared memory that each of so many resident blocks has for rows. The rest is for its static arrays,
// and 1 KB that the system takes of every block.
template <class Loss>
int64_t shared_for_rows(int64_t blocks) {
  constexpr int64_t kSystem = 1 << 10, kStatic = (Loss::kNumberTokens ? 2 : 1) << 10;
  return (max_shared() + kSystem) / blocks - kSystem - kStatic;
}

// Whether every row of such a layout starts on 16 bytes.
template <class T>
bool on_vectors(const void* start, const RowLayout& l) {
  constexpr int64_t N = Vec<T>::kSize;
  return reinterpret_cast<uintptr_t>(start) % 16 == 0 && l.class_stride == 1 && l.outer_stride % N == 0 &&
         l.inner_stride % N == 0;
}

// Vectors of a row that one block may keep in shared memory: those in registers follow, and all are of one part.
template <class T, int kInRegisters>
int64_t vectors_in_slots(int64_t n) {
  const int64_t each = part_classes<T>(n);
  return each / Vec<T>::kSize - (each < n ? kInRegisters : 0);
}

template <class Loss, class T, int kTeam, bool kBackward>
void launch_team(const RowArgs& a, cudaStream_t stream) {
  const int block = kTeam > 32 ? kTeam : kThreads;
  int64_t blocks = (a.rows * kTeam + block - 1) / block, slots = 0;
  if (kBackward && a.skip_unit_upstream) blocks = blocks_to_skip(blocks, block);
  if (kStays<Loss, T, kTeam, kBackward> && on_vectors<T>(a.x, a.x_layout) &&
      (!a.dx || on_vectors<T>(a.dx, a.dx_layout))) {
    const int64_t row = kParted<Loss, T, kTeam, kBackward>
                            ? vectors_in_slots<T, kTeam * kKept<Loss, T, kTeam, kBackward>>(a.n)
                            : a.n / Vec<T>::kSize,
                  capacity = shared_for_rows<Loss>(kBlocks<Loss, T, kTeam, kBackward>) / 16;
    slots = (row < capacity ? row : capacity) / kTeam * kTeam;
    const int64_t stay = int64_t{multiprocessors()} * kBlocks<Loss, T, kTeam, kBackward>;
    if (slots && blocks > stay) blocks = stay;
  }
  if constexpr (kTiles<Loss, kTeam>) slots = vectors_of_tile<T>(a);
  const size_t shared =
      16 * static_cast<size_t>(slots > 0 ? slots : 1);  // at least one: 0 bytes have no address
  launch_1d<&rows_kernel<Loss, T, kTeam, kBackward>>(blocks, block, shared, stream, a,
                                                     static_cast<int>(slots));
}
// The same with clusters, where the row has parts, all rows start on 16 bytes and the device has clusters; else
// false, and nothing is launched.
template <class Loss, class T>
bool launch_clusters_of_parts(const RowArgs& a, cudaStream_t stream) {
  constexpr int kTeam = 1024;
  const int parts = parts_of(a.n * int64_t{sizeof(T)});
  if (parts == 1 || !a.dx || !on_vectors<T>(a.x, a.x_layout) || !on_vectors<T>(a.dx, a.dx_layout))
    return false;
  const int64_t last = (a.n - (parts - 1) * part_classes<T>(a.n)) / Vec<T>::kSize,  // the shortest part
      capacity = shared_for_rows<Loss>(1) / 16, slots = (last < capacity ? last : capacity) / kTeam * kTeam;
  return slots > 0 &&
         launch_clusters_1d<&row_clusters_kernel<Loss, T>>(
             a.rows, parts, kTeam, 16 * static_cast<size_t>(slots), stream, a, static_cast<int>(slots));
}
// The smallest team of kTeams whose registers hold the row, if there is one.
template <class Loss, class T, int... kTeams>
bool launch_held(const RowArgs& a, cudaStream_t stream) {
  const auto launched = [&]<int kTeam>() {
    if constexpr (constexpr int kVectors = kHeld<Loss, T, kTeam, false>; kVectors > 0)
      if (a.n * int64_t{sizeof(T)} <= int64_t{16} * kTeam * kVectors) {
        launch_team<Loss, T, kTeam, false>(a, stream);
        return true;
      }
    return false;
  };
  return (launched.template operator()<kTeams>() || ...);
}
template <class Loss, class T, bool kBackward>
void launch_pass(const RowArgs& a, cudaStream_t stream) {
  if (a.x_layout.class_stride != 1 || a.logit_scale < 0) return launch_team<Loss, T, 1, kBackward>(a, stream);
  if constexpr (sizeof(T) < 8) {  // float64 is for accuracy: a warp for any length
    const int64_t bytes = a.n * int64_t{sizeof(T)};
    constexpr int kMaxTeam = kResident<Loss, kBackward>;
    if constexpr (!kBackward) {
      if (launch_held<Loss, T, 8, 16, 32, 64, 128, 256>(a, stream)) return;
      if constexpr (kParted<Loss, T, kMaxTeam, false>)
        if (launch_clusters_of_parts<Loss, T>(a, stream)) return;
      if (bytes > kHalfRowBytes) return launch_team<Loss, T, kMaxTeam, kBackward>(a, stream);
    }
    if constexpr (kHeld<Loss, T, 32, kBackward> > 0) {  // the shorter rows are launched
      launch_team<Loss, T, kMaxTeam / 2, kBackward>(a, stream);
    } else if constexpr (kBackward || Loss::kSoftcap) {  // more kernels are not worth their compile time
      if (bytes > kWarpRowBytes) return launch_team<Loss, T, kMaxTeam / 2, kBackward>(a, stream);
      launch_team<Loss, T, 32, kBackward>(a, stream);
    } else {
      if (bytes > kBlockRowBytes) return launch_team<Loss, T, kMaxTeam / 2, kBackward>(a, stream);
      if (bytes > kWarpRowBytes) return launch_team<Loss, T, 128, kBackward>(a, stream);
      launch_team<Loss, T, 32, kBackward>(a, stream);
    }
  } else {
    launch_team<Loss, T, 32, kBackward>(a, stream);
  }
}
template <class Loss, class T>
void launch_rows(const RowArgs& a, cudaStream_t stream) {
  if (a.pass == RowPass::backward) return launch_pass<Loss, T, true>(a, stream);
  launch_pass<Loss, T, false>(a, stream);
}

}  // namespace fastloss::cuda
