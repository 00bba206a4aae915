// A CUDA device without a GPU, for a torch that was built without CUDA: nothing else claims its dispatch key there.
//
// Its memory is the host's, and each operator runs the CPU's kernel on aliases of its operands. It refuses what CUDA
// refuses: operands on two devices, except for CPU scalars and CPU indices, and a generator of the CPU. It counts
// kernels and bytes that go to the device, and reports for what the host would wait.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <set>

using at::Tensor;
using c10::DeviceType;

static const c10::Device GPU(DeviceType::CUDA, 0), HOST(DeviceType::CPU);
static const c10::DispatchKeySet ON_GPU(c10::DispatchKey::CUDA), ON_HOST(c10::DispatchKey::CPU);
static std::atomic<long> launches{0}, sent{0};
static void (*report)(const char* kind, const char* what) = nullptr;

static void note(const char* kind, const std::string& what) {
  if (report) report(kind, what.c_str());
}

// Memory: the CPU's allocator, of which pinned blocks are remembered.

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto host = c10::GetAllocator(DeviceType::CPU)->allocate(size);
    auto free = host.get_deleter();
    void* start = host.get();
    return {start, host.release_context(), free, GPU};
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
static Memory memory;

struct Pinned final : c10::Allocator {
  static inline std::mutex lock;
  static inline auto& blocks = *new std::set<const void*>;  // never destroyed, because tensors may live longer
  static bool has(const void* start) {
    std::lock_guard<std::mutex> guard(lock);
    return blocks.count(start);
  }
  static void free(void* start) {
    std::lock_guard<std::mutex> guard(lock);
    blocks.erase(start);
    std::free(start);
  }
  c10::DataPtr allocate(size_t size) override {
    std::lock_guard<std::mutex> guard(lock);
    void* start = std::aligned_alloc(64, (size + 64) / 64 * 64);
    blocks.insert(start);
    return {start, start, &free, HOST};
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
static Pinned pinned;

// Return a tensor on the device, or on the host, with the memory of `tensor`, which it keeps alive.
static Tensor alias(const Tensor& tensor, bool on_gpu) {
  auto free = [](void* context) { delete static_cast<Tensor*>(context); };
  c10::DataPtr data(tensor.storage().mutable_data(), new Tensor(tensor), free, on_gpu ? GPU : HOST);
  auto* allocator = on_gpu ? &memory : c10::GetAllocator(DeviceType::CPU);
  auto size = tensor.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(data), allocator, /*resizable=*/true);
  auto keys = on_gpu ? ON_GPU : ON_HOST;
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// Any operator without a kernel below.

using Names = std::set<std::string>;
static const Names TAKE_CPU_INDICES = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
// The host waits for these, because it needs their numbers, or the size of their result depends on numbers.
static const Names WAIT = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_consecutive",
    "aten::unique_dim", "aten::repeat_interleave", "aten::bincount", "aten::_linalg_svd"};

struct Operand {
  Tensor device, host;
  const void* data;
};

struct Call {
  std::string name;
  std::vector<Operand> operands;
  std::string foreign;  // an operand on the CPU

  Tensor operand(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0) foreign = c10::str(tensor.sizes(), " of ", tensor.dtype());
      return tensor;
    }
    for (auto& each : operands)
      if (each.device.is_same(tensor)) return each.host;
    operands.push_back({tensor, alias(tensor, false), tensor.storage().data()});
    return operands.back().host;
  }

  c10::IValue argument(const c10::IValue& value) {
    TORCH_CHECK(!value.isGenerator(), name, ": Expected a 'cuda' device type for generator but found 'cpu'");
    if (value.isTensor()) return operand(value.toTensor());
    if (value.isDevice()) return HOST;
    if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& each : list) each = operand(each);
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& each : value.toOptionalTensorVector())
        list.push_back(each ? std::optional<Tensor>(operand(*each)) : std::nullopt);
      return list;
    }
    return value;
  }

  // The kernel may have resized an operand.
  void update() {
    for (auto& [device, host, data] : operands) {
      auto* held = device.unsafeGetTensorImpl();
      if (host.storage().data() != data) held->set_storage_keep_dtype(alias(host, true).storage());
      if (host.sizes() != device.sizes() || host.strides() != device.strides())
        held->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  Tensor result(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& each : operands)
      if (each.host.is_same(tensor)) return each.device;
    auto made = alias(tensor, true);
    for (auto& each : operands)  // a view has the storage of its base
      if (each.data && each.data == tensor.storage().data())
        made.unsafeGetTensorImpl()->set_storage_keep_dtype(each.device.storage());
    return made;
  }
};

static void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  launches++;
  Call call{op.schema().name()};
  if (WAIT.count(call.name)) note("wait", call.name);
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++)
    (*stack)[i] = call.argument((*stack)[i]);
  TORCH_CHECK(
      call.foreign.empty() || call.operands.empty() || TAKE_CPU_INDICES.count(call.name), call.name,
      ": Expected all tensors to be on the same device, but found one on the cpu: ", call.foreign);
  op.callBoxed(stack);
  call.update();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& each : list) each = call.result(each);
      value = list;
    }
  }
}

// The kernels of a device that are more than its arithmetic.

using Flag = std::optional<bool>;
using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<at::Device>;

static Tensor empty(at::IntArrayRef size, Type type, Layout, Where, Flag, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, ON_GPU, c10::dtype_or_default(type), format);
}

static Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Type type, Layout, Where, Flag) {
  return at::detail::empty_strided_generic(size, stride, &memory, ON_GPU, c10::dtype_or_default(type));
}

static Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  auto& host = to.is_cuda() ? from : to;
  if (host.is_cuda()) {
    launches++;
  } else {
    auto what = c10::str("copy ", to.is_cuda() ? "to" : "from", " the device, ", from.sizes(), " of ", from.dtype());
    bool is_pinned = Pinned::has(host.storage().data());
    if (!is_pinned || !non_blocking) note("wait", what);
    if (to.is_cuda()) {
      sent += from.numel() * to.itemsize();
      if (from.dtype() != to.dtype()) note("conversion", what);
      if (!is_pinned && from.nbytes() > 65536) note("pageable", what);  // smaller ones are copied aside at once
    }
  }
  (to.is_cuda() ? alias(to, false) : to).copy_(from.is_cuda() ? alias(from, false) : from);
  return to;
}

static at::Scalar number(const Tensor& tensor) {
  note("wait", "a number");
  return at::_local_scalar_dense(alias(tensor, false));
}

// The CPU's takes no integers.
static Tensor histc(const Tensor& tensor, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  launches++;
  return alias(alias(tensor, false).to(at::kDouble).histc(bins, low, high).to(tensor.scalar_type()), true);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &number);
  m.impl("histc", &histc);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  // Else it would have torch's loop over the groups, which reads their borders.
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

// What torch asks of a device: one GPU, whose stream does nothing.

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return Pinned::has(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
};

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory);
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

extern "C" {
// torch looks for the hooks of CUDA once, and has often done so before this is loaded. They have no state, so these
// take the place of the ones that it has found.
void install() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}
void watch(void (*function)(const char*, const char*)) { report = function; }
long launched() { return launches; }
long bytes_sent() { return sent; }
}
