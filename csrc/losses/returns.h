// Recursions along the steps of an episode. Forward runs from the last step to the first, its adjoint from
// the first to the last; the protocol is in drivers/scan.h:
//   step, output        s_t = M_t s_{t+1} + c_t, and what is returned of s_t and s_{t+1}
//   adjoint, gradient   q_t = M_t' (q_{t-1} + gradient arriving at s_t), and the gradients of the inputs
// A masked step is the identity: it passes the state on, and its outputs are 0. Behind a terminated step nothing
// follows: factors of 0 are selected, never multiplied by what another episode holds.
#pragma once
#include "../drivers/scan.h"

namespace fastloss::inline FL_ISA {

// Generalised advantage estimation. u = V of the next step, w = A:
//   A_t = r_t + gamma (1 - term_t) V_{t+1} - V_t + gamma lambda (1 - end_t) A_{t+1},  end = term or truncated
template <class R>
struct Gae {
  static constexpr int kInputs = 3, kOutputs = 2, kGradients = 3;  // r, V, V next -> A, A + V
  static constexpr bool kBackward = true;
  FL_HPARAMS(gamma, lam);
  R gamma, trace;
  bool next;  // next values are an input; else V one step later

  FL_FN explicit Gae(const ScanArgs& a)
      : gamma(R(a.hparams[H::gamma])),
        trace(R(a.hparams[H::gamma] * a.hparams[H::lam])),
        next(a.in[2] != nullptr) {}

  template <class F>
  FL_FN F discount(const ScanStep<F>& x) const {
    return x.terminated > 0 ? F{} : F{} + gamma;
  }
  template <class F>
  FL_FN F trace_decay(const ScanStep<F>& x) const {
    return x.terminated + x.truncated > 0 ? F{} : F{} + trace;
  }
  template <class F>
  FL_FN AffineStep<F> step(const ScanStep<F>& x) const {
    const F zero{}, one = zero + 1, n = discount(x), delta = x.in[0] - x.in[1];
    AffineStep<F> s{zero, x.in[1], trace_decay(x), next ? zero : n,
                    next ? delta + scaled(n, x.in[2]) : delta};
    s.decay_u = x.mask > 0 ? zero : one;
    s.add_u = x.mask > 0 ? s.add_u : zero;
    s.decay_w = x.mask > 0 ? s.decay_w : one;
    s.mix = x.mask > 0 ? s.mix : zero;
    s.add_w = x.mask > 0 ? s.add_w : zero;
    return s;
  }
  template <class F>
  FL_FN void output(const ScanStep<F>& x, F, F, F, F w, F* out) const {
    out[0] = x.mask > 0 ? w : F{};
    out[1] = x.mask > 0 ? w + x.in[1] : F{};
  }

  // u = gradient arriving at A, w = gradient arriving at V of the next step
  template <class F>
  FL_FN AffineStep<F> adjoint(const ScanStep<F>& x) const {
    const F zero{}, one = zero + 1, a = trace_decay(x), n = next ? zero : discount(x),
                    g = x.grad[0] + x.grad[1];
    AffineStep<F> s{a, scaled(a, g), zero, n, scaled(n, g)};
    s.decay_u = x.mask > 0 ? s.decay_u : one;
    s.add_u = x.mask > 0 ? s.add_u : zero;
    s.decay_w = x.mask > 0 ? zero : one;
    s.mix = x.mask > 0 ? s.mix : zero;
    s.add_w = x.mask > 0 ? s.add_w : zero;
    return s;
  }
  template <class F>
  FL_FN void gradient(const ScanStep<F>& x, F u, F w, F* out) const {
    const F p = u + (x.grad[0] + x.grad[1]);
    out[0] = x.mask > 0 ? p : F{};
    out[1] = x.mask > 0 ? w + (x.grad[1] - p) : F{};
    out[2] = x.mask > 0 ? scaled(discount(x), p) : F{};
  }
};

// V-trace (IMPALA), with importance ratios rho_t = exp(in[3]) and w = v - V:
//   v_t - V_t = min(rho, rho_max) (r_t + gamma V_{t+1} - V_t) + gamma lambda min(rho, c_max) (v - V)_{t+1}
// and the advantages min(rho, rho_pg) (r_t + gamma v_{t+1} - V_t).
template <class R>
struct VTrace {
  static constexpr int kInputs = 4, kOutputs = 2, kGradients = 0;  // r, V, V next, log rho -> v, advantage
  static constexpr bool kBackward = false;
  FL_HPARAMS(gamma, lam, clip_rho_threshold, clip_pg_rho_threshold);
  static_assert(H::gamma == int(Gae<R>::H::gamma) && H::lam == int(Gae<R>::H::lam));
  Gae<R> gae;
  R rho_max, pg_max;

  FL_FN explicit VTrace(const ScanArgs& a)
      : gae(a),
        rho_max(R(a.hparams[H::clip_rho_threshold])),
        pg_max(R(a.hparams[H::clip_pg_rho_threshold])) {}

  template <class F>
  FL_FN AffineStep<F> step(const ScanStep<F>& x) const {
    const F rho = exp(x.in[3]), one = F{} + 1, top = F{} + rho_max;
    const F weight = x.mask > 0 ? (rho > top ? top : rho) : one,
            cut = x.mask > 0 ? (rho > one ? one : rho) : one;
    AffineStep<F> s = gae.step(x);
    s.decay_w *= cut;
    s.mix *= weight;
    s.add_w *= weight;
    return s;
  }
  template <class F>
  FL_FN void output(const ScanStep<F>& x, F u, F w, F, F w_now, F* out) const {
    const F zero{}, rho = exp(x.in[3]), top = zero + pg_max;
    const F behind = x.terminated + x.truncated > 0 ? zero : w;
    const F next = (gae.next ? x.in[2] : u) + behind;
    const F delta = x.in[0] + scaled(gae.discount(x), next) - x.in[1];
    out[0] = x.mask > 0 ? x.in[1] + w_now : zero;
    out[1] = x.mask > 0 ? (rho > top ? top : rho) * delta : zero;
  }
};

}  // namespace fastloss::inline FL_ISA

#define FASTLOSS_SCANS(X) X(gae, Gae) X(vtrace, VTrace)
