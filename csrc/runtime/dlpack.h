// Tensors over parts of another tensor's memory, made through the exchange functions that an array library offers in
// DLPack 1.x: a fifth of what its Python functions take for each.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

namespace llmopt::dlpack {

// The structs of DLPack's C interface, as far as they are used.
struct Array {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};
struct ManagedArray {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedArray*);
  uint64_t flags;
  Array array;
};
struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void* allocate;
  int (*from_object)(void* object, ManagedArray** out);  // not 0: a Python error is set
  int (*to_object)(ManagedArray* array, void** object);  // takes the array over
  int (*look_at)(void* object, Array* out);              // what the object holds, as long as it is left alone
};

// Parts of the memory of a dense tensor [n]. Holds the memory only until the first tensors are made: they share it.
class Parts {
 public:
  Parts(const Exchange* exchange, ManagedArray* memory)
      : exchange_(exchange), kept_(memory, [](ManagedArray* m) { m->deleter(m); }), memory_(kept_) {
    const Array& a = memory->array;
    if (a.ndim != 1 || (a.shape[0] > 1 && a.strides[0] != 1)) throw std::invalid_argument("the memory is no dense row");
    elements_ = a.shape[0];
  }

  static constexpr int kDims = 4;

  // Whether object i is a tensor of this size and stride that begins at element start + i * step. False, perhaps with a
  // Python error, where one cannot be looked at.
  bool hold(void* const* objects, int64_t count, int64_t start, int64_t step, const std::vector<int64_t>& size,
            const std::vector<int64_t>& stride) const {
    const std::shared_ptr<ManagedArray> memory = memory_.lock();
    if (!memory || size.size() != kDims || stride.size() != kDims) return false;
    const Array& whole = memory->array;
    for (int64_t i = 0; i < count; ++i) {
      Array given;
      if (exchange_->look_at(objects[i], &given)) return false;
      if (static_cast<char*>(given.data) + given.byte_offset != place(whole, start + i * step)) return false;
      if (given.dtype_code != whole.dtype_code || given.dtype_bits != whole.dtype_bits) return false;
      if (given.ndim != kDims || !std::equal(size.begin(), size.end(), given.shape) ||
          !std::equal(stride.begin(), stride.end(), given.strides))
        return false;
    }
    return true;
  }

  // Hands `count` new objects to take(void*): tensor i begins at element start + i * step, and so does its storage.
  // False, with a Python error, where one cannot be made.
  template <class Take>
  bool over(int64_t count, int64_t start, int64_t step, const std::vector<int64_t>& size,
            const std::vector<int64_t>& stride, Take take) {
    if (size.size() != kDims || stride.size() != kDims || count < 0 || start < 0 || step < 0)
      throw std::invalid_argument("parts have four sizes and strides");
    int64_t last = start + (count - 1) * step;
    bool empty = count == 0;
    for (int d = 0; d < kDims; ++d) {
      if (size[d] < 0 || stride[d] < 0) throw std::invalid_argument("sizes and strides of parts are not negative");
      last += (size[d] - 1) * stride[d];
      empty |= size[d] == 0;
    }
    if (!empty && last >= elements_) throw std::invalid_argument("the parts do not fit the memory");
    const std::shared_ptr<ManagedArray> memory = memory_.lock();
    if (!memory) throw std::invalid_argument("the memory is gone: no tensor over it is left");
    const Array& whole = memory->array;
    for (int64_t i = 0; i < count; ++i) {
      auto part = std::make_unique<Part>();
      part->memory = memory;
      for (int d = 0; d < kDims; ++d) part->size[d] = size[d], part->stride[d] = stride[d];
      Array array = whole;
      array.data = place(whole, start + i * step);
      array.byte_offset = 0;
      array.ndim = kDims, array.shape = part->size, array.strides = part->stride;
      part->managed = {1, 0, part.get(), [](ManagedArray* m) { delete static_cast<Part*>(m->context); }, 0, array};
      void* object = nullptr;
      // Never deleted where that fails: whether it was taken over by then cannot be known.
      if (exchange_->to_object(&part.release()->managed, &object)) return false;
      take(object);
    }
    kept_.reset();
    return true;
  }

 private:
  struct Part {
    ManagedArray managed;
    int64_t size[kDims], stride[kDims];
    std::shared_ptr<ManagedArray> memory;
  };

  static char* place(const Array& whole, int64_t element) {
    return static_cast<char*>(whole.data) + whole.byte_offset + element * (whole.dtype_bits / 8);
  }

  const Exchange* exchange_;
  std::shared_ptr<ManagedArray> kept_;
  std::weak_ptr<ManagedArray> memory_;
  int64_t elements_;
};

}  // namespace llmopt::dlpack
