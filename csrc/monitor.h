// What relu_ext.Monitor asks of a layer's output, on the device where it is. Nothing here waits for the device, and no
// dispatch mode sees it: a checkpoint's would miss it when the forward is repeated. kept and last: a cell a channel;
// first: one cell.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace relu_ext::monitor {

// A tensor with numbers of its own: no subclass, and nothing that is traced or transformed.
bool is_observable(const at::Tensor&);

// So many int64 of 0 on the tensor's device.
at::Tensor cells(const at::Tensor& beside, int64_t count);

// Does this thread run a backward pass? A forward that it meets is a checkpoint's, computed once more.
bool in_backward();

// Adds up the bits that output's node keeps, by the index of dimension dim, as kernels.h says. False: there are none.
bool count_bits(const at::Tensor& output, int64_t dim, int64_t step, const at::Tensor& kept, const at::Tensor& last);

// The same with the bits that this operation makes of this input. False: there are no kernels for it.
bool count_bits_of(const std::string& operation, const std::vector<double>& scalars, const at::Tensor& input,
                   int64_t dim, int64_t step, const at::Tensor& kept, const at::Tensor& last);

// first becomes step if it is 0 and an element is infinite or NaN.
void find_nonfinite(const at::Tensor&, int64_t step, const at::Tensor& first);

// The same for the gradient that will arrive at output, where there is a node for one to arrive at.
void watch_gradient(const at::Tensor& output, int64_t step, const at::Tensor& first);

}  // namespace relu_ext::monitor
