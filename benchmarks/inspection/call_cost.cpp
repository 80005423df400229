// For call_cost.py: replaces torch's operators on tensors without data (device meta), so that a call takes only the time
// of its dispatch. torch computes the shapes of some of them in Python, which takes longer than all that is measured.

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

at::Tensor new_empty(
    const at::Tensor& like, at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::empty(size, dtype ? like.options().dtype(*dtype) : like.options());
}

at::Tensor empty_like(
    const at::Tensor& like, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat>) {
  return at::empty(like.sizes(), dtype ? like.options().dtype(*dtype) : like.options());
}

at::Tensor addmm(const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar&, const at::Scalar&) {
  return at::empty({a.size(0), b.size(1)}, a.options());
}

at::Tensor addmm_activation(
    const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar&, const at::Scalar&, bool) {
  return at::empty({a.size(0), b.size(1)}, a.options());
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) { return at::empty({a.size(0), b.size(1)}, a.options()); }

at::Tensor& mm_out(const at::Tensor&, const at::Tensor&, at::Tensor& out) { return out; }

at::Tensor& addmm_out(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Scalar&, const at::Scalar&, at::Tensor& out) {
  return out;
}

at::Tensor& addmm_(at::Tensor& self, const at::Tensor&, const at::Tensor&, const at::Scalar&, const at::Scalar&) {
  return self;
}

at::Tensor add(const at::Tensor& a, const at::Tensor&, const at::Scalar&) { return at::empty(a.sizes(), a.options()); }

at::Tensor& add_(at::Tensor& a, const at::Tensor&, const at::Scalar&) { return a; }

at::Tensor cat(const at::ITensorListRef& tensors, int64_t dim) {
  auto list = tensors.materialize();
  auto shape = list.front().get().sizes().vec();
  dim = dim < 0 ? dim + static_cast<int64_t>(shape.size()) : dim;
  shape[dim] = 0;
  for (const at::Tensor& t : list) shape[dim] += t.size(dim);
  return at::empty(shape, list.front().get().options());
}

at::Tensor sum(const at::Tensor& x, at::OptionalIntArrayRef dims, bool keep, std::optional<at::ScalarType> dtype) {
  auto shape = x.sizes().vec();
  for (int64_t dim : dims.value_or(at::IntArrayRef{})) shape[dim < 0 ? dim + x.dim() : dim] = keep ? 1 : 0;
  if (!keep) shape.erase(std::remove(shape.begin(), shape.end(), 0), shape.end());
  return at::empty(shape, dtype ? x.options().dtype(*dtype) : x.options());
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor&, bool) { return to; }

at::Tensor& fill_(at::Tensor& x, const at::Scalar&) { return x; }

at::Tensor& zero_(at::Tensor& x) { return x; }

}  // namespace

TORCH_LIBRARY_IMPL(aten, Meta, m) {
  m.impl("new_empty", new_empty);
  m.impl("empty_like", empty_like);
  m.impl("mm", mm);
  m.impl("mm.out", mm_out);
  m.impl("addmm", addmm);
  m.impl("_addmm_activation", addmm_activation);
  m.impl("addmm.out", addmm_out);
  m.impl("addmm_", addmm_);
  m.impl("add.Tensor", add);
  m.impl("add_.Tensor", add_);
  m.impl("cat", cat);
  m.impl("sum.dim_IntList", sum);
  m.impl("copy_", copy_);
  m.impl("fill_.Scalar", fill_);
  m.impl("zero_", zero_);
}
