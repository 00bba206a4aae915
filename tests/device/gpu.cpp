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
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>

using at::Tensor;
using c10::DeviceType;
using Names = std::set<std::string>;

static const c10::Device GPU(DeviceType::CUDA, 0);
static const c10::DispatchKeySet KEY(c10::DispatchKey::CUDA);

// What is counted and reported.

static std::atomic<long> launches{0}, sent{0};
static void (*report)(const char* kind, const char* what) = nullptr;

static void note(const char* kind, const std::string& what) {
  if (report) report(kind, what.c_str());
}

// Memory: the CPU's allocator, of which pinned blocks are remembered.

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    c10::DataPtr host = c10::GetAllocator(DeviceType::CPU)->allocate(size);
    void* start = host.get();
    auto free = host.get_deleter();
    return {start, host.release_context(), free, GPU};
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
static Memory memory;

static std::mutex pinned_lock;
static auto& pinned = *new std::map<const char*, size_t>;  // never destroyed, because tensors may live longer

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* host = new c10::DataPtr(c10::GetAllocator(DeviceType::CPU)->allocate(size));
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<const char*>(host->get())] = size;
    return {host->get(), host, &free, c10::Device(DeviceType::CPU)};
  }
  static void free(void* context) {
    auto* host = static_cast<c10::DataPtr*>(context);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<const char*>(host->get()));
    delete host;
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
static Pinned pinned_memory;

static bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  auto [start, size] = *std::prev(after);
  return data < start + size;
}

// Return a tensor on the device, or on the CPU, with the memory of `tensor`, which it keeps alive.
static Tensor alias(const Tensor& tensor, bool on_device) {
  auto free = [](void* context) { delete static_cast<Tensor*>(context); };
  c10::Device where = on_device ? GPU : c10::Device(DeviceType::CPU);
  c10::DataPtr data(tensor.storage().mutable_data(), new Tensor(tensor), free, where);
  c10::Allocator* allocator = on_device ? &memory : c10::GetAllocator(DeviceType::CPU);
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), allocator, /*resizable=*/true);
  auto keys = on_device ? KEY : c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// Any operator without a kernel below.

static const Names TAKE_CPU_INDICES = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index"};
// The host waits for these, because it needs their numbers, or the size of their result depends on numbers.
static const Names WAIT = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_consecutive",
    "aten::unique_dim", "aten::repeat_interleave", "aten::bincount", "aten::_linalg_svd", "aten::linalg_lstsq"};

struct Operand {
  Tensor device, host;
  const void* data;
};

struct Call {
  std::string name;
  std::vector<Operand> operands;
  bool to_host = false;
  std::string foreign;  // the shape of an operand on the CPU

  Tensor alias_of(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0) foreign = c10::str(tensor.sizes(), " of ", tensor.dtype());
      return tensor;
    }
    for (auto& each : operands) {
      if (each.device.is_same(tensor)) return each.host;
    }
    operands.push_back({tensor, alias(tensor, false), tensor.storage().data()});
    return operands.back().host;
  }

  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return alias_of(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(alias_of(each));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& each : value.toOptionalTensorVector()) {
        list.push_back(each ? std::optional<Tensor>(alias_of(*each)) : std::nullopt);
      }
      return list;
    }
    if (value.isGenerator()) {
      TORCH_CHECK(false, name, ": Expected a 'cuda' device type for generator but found 'cpu'");
    }
    if (value.isDevice()) {
      to_host = value.toDevice().is_cpu();
      return c10::Device(DeviceType::CPU);
    }
    return value;
  }

  Tensor result(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda() || to_host) return tensor;
    for (auto& each : operands) {
      if (each.host.is_same(tensor)) return each.device;
    }
    for (auto& each : operands) {  // a view
      if (each.data && each.host.storage().data() == tensor.storage().data()) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(each.device.storage()), KEY, tensor.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(
            tensor.sizes(), tensor.strides(), tensor.storage_offset());
        return view;
      }
    }
    return alias(tensor, true);
  }

  // The kernel may have resized an operand.
  void update() {
    for (auto& [device, host, data] : operands) {
      auto* held = device.unsafeGetTensorImpl();
      if (host.storage().data() != data) held->set_storage_keep_dtype(alias(host, true).storage());
      if (host.sizes() != device.sizes() || host.strides() != device.strides()) {
        held->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }
};

static void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call{op.schema().name()};
  launches++;
  if (WAIT.count(call.name)) note("wait", call.name);
  size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < stack->size(); i++) (*stack)[i] = call.argument((*stack)[i]);
  TORCH_CHECK(
      call.foreign.empty() || call.operands.empty() || TAKE_CPU_INDICES.count(call.name), call.name,
      ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu (",
      call.foreign, ")");
  op.callBoxed(stack);
  call.update();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(call.result(each));
      value = list;
    }
  }
}

// The kernels of a device that are more than its arithmetic.

static Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEY, c10::dtype_or_default(dtype), format);
}

static Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEY, c10::dtype_or_default(dtype));
}

static Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  std::string what = c10::str(from.sizes(), " of ", from.dtype());
  if (to.is_cuda() && from.is_cuda()) {
    launches++;
  } else if (to.is_cuda()) {
    bool is_free = is_pinned(from.storage().data());
    sent += from.numel() * to.itemsize();
    if (from.dtype() != to.dtype()) note("conversion", what);
    if (!is_free && from.nbytes() > 65536) note("pageable", what);  // smaller ones are copied aside at once
    if (!is_free || !non_blocking) note("wait", "copy to the device, " + what);
  } else if (!non_blocking || !is_pinned(to.storage().data())) {
    note("wait", "copy from the device, " + what);
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

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

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
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  // Without a kernel of its own, the device would get torch's loop over the groups, which reads their borders.
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

// What torch asks of a device: one GPU, whose streams do nothing.

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Device getDeviceFromPtr(void*) const override { return GPU; }
};

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory);
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

extern "C" {
// torch looks for the hooks of CUDA once, and has often done so before this is loaded. They have no state, so these
// take the place of the ones that it has found.
void install() {
  auto* found = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (found) Hooks();
}
void watch(void (*function)(const char*, const char*)) { report = function; }
long launched() { return launches; }
long bytes_sent() { return sent; }
}
