// The launchers of an activation fused with its neighbours.
#include <type_traits>

#include "../dispatch.h"
#include "fused.cuh"
#include "kernels.h"
#include "launch_channels.cuh"

namespace relu_ext::cuda {
namespace {

// Two vectors of each operand; forward, float64 needs as many as share a byte of bits, and twice the registers for
// them.
template <class T>
using FusedTile = std::conditional_t<sizeof(T) == 8, Tile<256, 4, Hint::none, Hint::none, 2>, Tile<256, 2>>;
using FusedBackwardTile = Tile<256, 2>;

// body(T{}, act).
template <class Work, class Body>
cudaError_t with_fused(const Work& work, Body body) {
  return with_dtype(work.dtype, [&](auto element) {
    return with_fused_activation<decltype(element), Device::cuda>(work.activation, work.scalars,
                                                                  [&](auto act) { return body(element, act); });
  });
}

// body(channels, aligned), channels being a ByChannel: any one where nothing has values for each channel.
template <class T, bool has_channels, class Body>
cudaError_t with_channels(const Channels& channels, bool is_aligned, bool values_are, Body body) {
  if constexpr (has_channels) {
    return with_spread(channels, Vector<T>::lanes, is_aligned, values_are, [&](auto spread, auto aligned) {
      return body(by_channel<decltype(spread)::value>(channels), aligned);
    });
  } else {
    const ByChannel<Spread::one> none{Divisor(1), Divisor(1)};
    return is_aligned ? body(none, std::true_type{}) : body(none, std::false_type{});
  }
}

// Elsewhere what is loaded takes instructions enough to ask for more.
template <class Channels, class Aligned>
constexpr bool is_fast = Aligned::value && Channels::spread != Spread::any;

// body(chosen), with a kernel for either where it is to be fast.
template <bool fast, class Body>
cudaError_t with_choice(bool choice, Body body) {
  if constexpr (!fast)
    return body(Chosen<Choice::asked>{choice});
  else
    return choice ? body(Chosen<Choice::yes>{}) : body(Chosen<Choice::no>{});
}
template <bool fast, class Body>
cudaError_t with_choices(bool first, bool second, Body body) {
  return with_choice<fast>(
      first, [&](auto first) { return with_choice<fast>(second, [&](auto second) { return body(first, second); }); });
}

template <class T, class Parts, class Activation>
cudaError_t forward_with(const Fused& work, Activation act, int64_t numel, cudaStream_t stream) {
  const bool is_aligned = are_aligned({work.input, Parts::residual ? work.residual : nullptr, work.output});
  const bool values_are = are_aligned({Parts::scale ? work.scale : nullptr, Parts::shift ? work.shift : nullptr});
  const auto run = [&](auto channels, auto aligned) {
    using Tile = FusedTile<T>;
    constexpr Spread spread = decltype(channels)::spread;
    constexpr bool whole = decltype(aligned)::value, fast = is_fast<decltype(channels), decltype(aligned)>;
    const Operands<T, spread> operands{channels,
                                       static_cast<const T*>(work.scale),
                                       static_cast<const T*>(work.shift),
                                       static_cast<const T*>(work.residual),
                                       work.dropout.stream,
                                       work.dropout.last,
                                       Arithmetic<T>(work.dropout.factor)};
    return with_choice<fast>(work.bits, [&](auto with_bits) {
      return launch(fused_kernel<Parts, T, Tile, whole, spread, decltype(with_bits)::choice, Activation>,
                    blocks<T, Tile>(numel), Tile::threads, stream, act, operands, with_bits,
                    static_cast<const T*>(work.input), static_cast<T*>(work.output), work.bits, numel);
    });
  };
  constexpr bool has_channels = Parts::scale || Parts::shift;
  return with_channels<T, has_channels>(work.channels, is_aligned, values_are, run);
}

const void* outputs_of(const FusedBackward& work) { return work.kept_as == Kept::bits ? nullptr : work.kept; }

// To grad_input, and scaled to grad_residual as well where that is wanted; not scaled, to either.
template <class T, bool scaled, class Activation>
cudaError_t each_element(const FusedBackward& work, Activation act, int64_t numel, cudaStream_t stream) {
  T* const residual = static_cast<T*>(scaled ? work.grad_residual : nullptr);
  T* const output = static_cast<T*>(scaled || work.grad_input ? work.grad_input : work.grad_residual);
  const bool is_aligned = are_aligned({work.grad, outputs_of(work), output, residual});
  const auto run = [&](auto channels, auto aligned) {
    using Tile = FusedBackwardTile;
    const auto run = [&](auto from_bits, auto to_residual) {
      using Gradients =
          ElementGradients<T, decltype(channels), decltype(from_bits)::choice, scaled, decltype(to_residual)::choice>;
      const Gradients gradients{to_residual,
                                {from_bits, work.kept},
                                channels,
                                static_cast<const T*>(work.scale),
                                static_cast<const T*>(work.grad),
                                output,
                                residual};
      return launch(fused_backward_kernel<T, Tile, decltype(aligned)::value, Activation, Gradients>,
                    blocks<T, Tile>(numel), Tile::threads, stream, act, gradients, numel);
    };
    constexpr bool fast = is_fast<decltype(channels), decltype(aligned)>;
    const bool from_bits = work.kept_as == Kept::bits;
    if constexpr (scaled)
      return with_choices<fast>(from_bits, residual, run);
    else
      return with_choice<fast>(from_bits, [&](auto from_bits) { return run(from_bits, Chosen<Choice::no>{}); });
  };
  return with_channels<T, scaled>(work.channels, is_aligned, are_aligned({work.scale}), run);
}

template <class T, class Activation>
cudaError_t without_sums(const FusedBackward& work, Activation act, int64_t numel, cudaStream_t stream) {
  if (numel == 0 || !(work.grad_input || work.grad_residual)) return cudaSuccess;
  if (work.scale && work.grad_input) return each_element<T, true>(work, act, numel, stream);
  if (!work.factor) return each_element<T, false>(work, act, numel, stream);
  const Dropped<T, Activation> dropped{act, Arithmetic<T>(work.factor)};
  return each_element<T, false>(work, dropped, numel, stream);
}

template <class T, class Activation>
cudaError_t with_sums(const FusedBackward& work, Activation act, int64_t numel, Arithmetic<T>* workspace,
                      cudaStream_t stream) {
  const bool is_aligned = are_aligned(
      {work.grad, outputs_of(work), work.grad_scale ? work.input : nullptr, work.grad_input, work.grad_residual});
  const auto with_work = [&](auto aligned, auto body) {
    const bool from_bits = work.kept_as == Kept::bits;
    return with_choices<decltype(aligned)::value>(from_bits, work.grad_scale, [&](auto from_bits, auto with_input) {
      return body(FusedSums<T, decltype(from_bits)::choice, decltype(with_input)::choice, Activation>{
          act,
          with_input,
          {from_bits, work.kept},
          static_cast<const T*>(work.scale),
          static_cast<const T*>(work.grad),
          static_cast<const T*>(work.input),
          static_cast<T*>(work.grad_input),
          static_cast<T*>(work.grad_residual)});
    });
  };
  const cudaError_t error =
      numel ? launch_sums<T>(work.channels, numel, is_aligned, with_work, workspace, stream) : cudaSuccess;
  if (error) return error;
  return join_sums<T>(work.channels, numel, {static_cast<T*>(work.grad_shift), static_cast<T*>(work.grad_scale)},
                      workspace, stream);
}

bool wants_sums(const FusedBackward& work) { return work.grad_scale || work.grad_shift; }

}  // namespace

cudaError_t fused(const Fused& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_fused(work, [&](auto element, auto act) {
    using T = decltype(element);
    return with_parts<T>(work, [&](auto parts) { return forward_with<T, decltype(parts)>(work, act, numel, stream); });
  });
}

int64_t fused_workspace(const FusedBackward& work, int64_t numel) {
  if (!wants_sums(work) || numel == 0) return 0;
  return with_dtype(work.dtype,
                    [&](auto element) { return workspace_of<decltype(element)>(work.channels, numel, most_sums); });
}

cudaError_t fused_backward(const FusedBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  return with_fused(work, [&](auto element, auto act) {
    using T = decltype(element);
    if (wants_sums(work)) return with_sums<T>(work, act, numel, static_cast<Arithmetic<T>*>(workspace), stream);
    return without_sums<T>(work, act, numel, stream);
  });
}

}  // namespace relu_ext::cuda
