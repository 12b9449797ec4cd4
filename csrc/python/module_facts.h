// What a module and the objects below it have to hold, looked up in their dictionaries as Python looks up attributes,
// without its interpreter in between.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/dlpack.h"

namespace llmopt {

namespace py = pybind11;

enum class FactKind {
  kAbsent,    // the key is not there
  kPresent,   // whatever it stands for
  kConstant,  // a number, string or the like: of the type that is expected, and equal
  kObject,    // of the type that is expected; its own dictionary may own further facts
  kDict,      // a dict, which may own further facts
  kTensor,    // a tensor of the class, dtype, size and stride that the first had, and as much in need of gradients
};

struct Fact {
  int owner;  // the fact before it whose value's dictionary has the key; -1: the root's
  py::object key;
  FactKind kind;
  py::object expected;
};

// What a weak reference refers to, None where that is gone; borrowed.
inline PyObject* referent(PyObject* reference) {
  if (!PyWeakref_CheckRef(reference)) throw py::type_error("a weak reference is expected");
  return PyWeakref_GetObject(reference);
}

class ModuleFacts {
 public:
  // same: pairs of facts that stand for one object; tensors: those that are expected, in the order of their facts;
  // requires_grad: the property of tensors.
  ModuleFacts(std::vector<Fact> facts, std::vector<std::pair<size_t, size_t>> same, const dlpack::Exchange* exchange,
              const py::tuple& tensors, py::object requires_grad)
      : facts_(std::move(facts)),
        same_(std::move(same)),
        exchange_(exchange),
        requires_grad_(std::move(requires_grad)) {
    for (size_t i = 0; i < facts_.size(); ++i) {
      const int owner = facts_[i].owner;
      if (owner >= static_cast<int>(i) || (owner >= 0 && !owns(facts_[owner].kind)))
        throw std::invalid_argument("fact " + std::to_string(i) + " has no owner before it");
      if (facts_[i].kind == FactKind::kTensor) tensors_.push_back(i);
    }
    for (auto [a, b] : same_)
      if (a >= facts_.size() || b >= facts_.size())
        throw std::invalid_argument("same names a fact that does not exist");
    if (tensors.size() != tensors_.size()) throw std::invalid_argument("facts need as many tensors as they speak of");
    if (!Py_TYPE(requires_grad_.ptr())->tp_descr_get) throw py::type_error("requires_grad is no property");
    for (py::handle tensor : tensors) {
      dlpack::Array array;
      if (exchange_->look_at(tensor.ptr(), &array)) throw py::error_already_set();
      forms_.emplace_back(array, py::type::of(tensor), needs_gradients(tensor.ptr()));
    }
  }

  // All hold of a root, and each tensor is the one that `known` has a weak reference to.
  bool hold(py::handle root, const py::tuple& known) const {
    Found found;
    if (known.size() != tensors_.size() || !look_up(root.ptr(), &found)) return false;
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (referent(PyTuple_GET_ITEM(known.ptr(), i)) != found.values[tensors_[i]].ptr()) return false;
    return have_forms(found);
  }

  // The tensors of a root of which all hold, None of others.
  py::object tensors(py::handle root) const {
    Found found;
    if (!look_up(root.ptr(), &found) || !have_forms(found)) return py::none();
    py::tuple tensors(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) tensors[i] = found.values[tensors_[i]];
    return tensors;
  }

  // Where the next `hold` of a root looks: addresses and as many sizes in bytes. None where not all hold.
  py::object memory(py::handle root) const {
    Found found;
    if (!look_up(root.ptr(), &found)) return py::none();
    std::vector<int64_t> addresses, bytes;
    const auto add = [&](const void* at, int64_t size) {
      addresses.push_back(reinterpret_cast<int64_t>(at));
      bytes.push_back(size);
    };
    for (size_t i = 0; i < facts_.size(); ++i) {
      const auto* dict = reinterpret_cast<const PyDictObject*>(found.dicts[i].ptr());
      if (!dict) continue;
      const bool shared = dict->ma_values;  // keys are the class's: the object has values alone
      add(found.values[i].ptr(), kObjectBytes);
      add(dict, sizeof *dict);
      add(shared ? static_cast<const void*>(dict->ma_values) : dict->ma_keys, kKeyBytes * (dict->ma_used + 1));
    }
    return py::make_tuple(addresses, bytes);
  }

 private:
  static constexpr int64_t kObjectBytes = 64, kKeyBytes = 24;

  struct Found {
    // Of each fact: what its key stands for, and the dictionary of that. Python may run others in between (a key that
    // is compared, garbage that is collected), who may change what owns these.
    std::vector<py::object> values, dicts;
  };

  // What a tensor is but for its numbers: nobody has to put another into its place to change that.
  struct Form {
    uint8_t dtype_code, dtype_bits;
    int32_t device_type, device_id;
    std::vector<int64_t> size, stride;
    py::object type;
    bool needs_gradients;

    Form(const dlpack::Array& a, py::object type_, bool needs_gradients_)
        : dtype_code(a.dtype_code),
          dtype_bits(a.dtype_bits),
          device_type(a.device_type),
          device_id(a.device_id),
          size(a.shape, a.shape + a.ndim),
          stride(a.strides, a.strides + a.ndim),
          type(std::move(type_)),
          needs_gradients(needs_gradients_) {}

    bool is_of(const dlpack::Array& a) const {
      return a.dtype_code == dtype_code && a.dtype_bits == dtype_bits && a.device_type == device_type &&
             a.device_id == device_id && a.ndim == static_cast<int32_t>(size.size()) &&
             std::equal(size.begin(), size.end(), a.shape) && std::equal(stride.begin(), stride.end(), a.strides);
    }
  };

  bool have_forms(const Found& found) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      PyObject* tensor = found.values[tensors_[i]].ptr();
      if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != forms_[i].type.ptr()) return false;
      dlpack::Array array;
      if (exchange_->look_at(tensor, &array)) {
        PyErr_Clear();  // what cannot be looked at is of another kind
        return false;
      }
      if (!forms_[i].is_of(array) || needs_gradients(tensor) != forms_[i].needs_gradients) return false;
    }
    return true;
  }

  static bool owns(FactKind kind) { return kind == FactKind::kObject || kind == FactKind::kDict; }

  bool needs_gradients(PyObject* tensor) const {
    PyObject* property = requires_grad_.ptr();
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    const auto said = py::reinterpret_steal<py::object>(Py_TYPE(property)->tp_descr_get(property, tensor, type));
    if (!said) throw py::error_already_set();
    return said.ptr() == Py_True;
  }

  bool look_up(PyObject* root, Found* found) const {
    found->values.resize(facts_.size());
    found->dicts.resize(facts_.size());
    const py::object root_dict = dict_of(root);
    for (size_t i = 0; i < facts_.size(); ++i) {
      const Fact& fact = facts_[i];
      const py::object& owner = fact.owner < 0 ? root_dict : found->dicts[fact.owner];
      if (!owner) return false;
      auto value = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(owner.ptr(), fact.key.ptr()));
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      if (!holds(fact, value.ptr())) return false;
      if (fact.kind == FactKind::kObject) found->dicts[i] = dict_of(value.ptr());
      if (fact.kind == FactKind::kDict) found->dicts[i] = value;
      found->values[i] = std::move(value);
    }
    for (auto [a, b] : same_)
      if (!found->values[a].is(found->values[b])) return false;
    return true;
  }

  static bool holds(const Fact& fact, PyObject* value) {
    PyObject* expected = fact.expected.ptr();
    if (fact.kind == FactKind::kAbsent || !value) return fact.kind == FactKind::kAbsent && !value;
    if (fact.kind == FactKind::kConstant)
      return value == expected || (Py_TYPE(value) == Py_TYPE(expected) && equal(value, expected));
    if (fact.kind == FactKind::kObject) return reinterpret_cast<PyObject*>(Py_TYPE(value)) == expected;
    return fact.kind != FactKind::kDict || PyDict_CheckExact(value);
  }

  static bool equal(PyObject* a, PyObject* b) {
    const int result = PyObject_RichCompareBool(a, b, Py_EQ);
    if (result < 0) throw py::error_already_set();
    return result == 1;
  }

  // Of an object; null where it has none.
  static py::object dict_of(PyObject* object) {
    PyObject* dict = PyObject_GenericGetDict(object, nullptr);
    if (!dict) PyErr_Clear();
    return py::reinterpret_steal<py::object>(dict);
  }

  std::vector<Fact> facts_;
  std::vector<std::pair<size_t, size_t>> same_;
  const dlpack::Exchange* exchange_;
  py::object requires_grad_;
  std::vector<size_t> tensors_;  // the facts of that kind
  std::vector<Form> forms_;      // of each of those
};

// The order of a graph's arguments, of which a call brings some and a module holds the others.
class ArgumentOrder {
 public:
  // places: of each argument its place among those that are held, or, from -1 down, among those that come with a call.
  explicit ArgumentOrder(std::vector<int> places) : places_(std::move(places)) {}

  // held: weak references. None where one of those is gone.
  py::object all(const py::tuple& held, const py::tuple& given) const {
    py::tuple arguments(places_.size());
    for (size_t i = 0; i < places_.size(); ++i) {
      const bool comes = places_[i] < 0;
      const auto place = static_cast<size_t>(comes ? -1 - places_[i] : places_[i]);
      const py::tuple& from = comes ? given : held;
      if (place >= from.size()) throw py::index_error("a place is beyond the arguments");
      PyObject* value = PyTuple_GET_ITEM(from.ptr(), place);
      if (!comes && (value = referent(value)) == Py_None) return py::none();
      arguments[i] = py::handle(value);
    }
    return arguments;
  }

 private:
  std::vector<int> places_;
};

}  // namespace llmopt
