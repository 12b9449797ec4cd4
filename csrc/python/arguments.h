// Noticing that a call's arguments are not those of the call before.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>
#include <vector>

namespace llmopt {

namespace py = pybind11;

// Where some of a call's arguments were and how often they had been edited. They are tensors that somebody else keeps
// alive: an object is asked only where a call has passed the same one again. In a loop of Python's this is a good part
// of a short call.
class Arguments {
 public:
  // address_of, version_of: what Python has for a tensor's address (a method) and its count of edits (a property);
  // counted: who has one.
  Arguments(const py::tuple& arguments, const std::vector<size_t>& positions, py::object address_of,
            py::object version_of, const std::vector<bool>& counted)
      : address_of_(std::move(address_of)), version_of_(std::move(version_of)) {
    if (positions.size() != counted.size()) throw std::invalid_argument("Arguments needs as many flags as positions");
    if (!Py_TYPE(version_of_.ptr())->tp_descr_get) throw py::type_error("version_of is no property");
    for (size_t i = 0; i < positions.size(); ++i) {
      if (positions[i] >= arguments.size()) throw py::index_error("a position is beyond the arguments");
      rows_.push_back({positions[i], PyTuple_GET_ITEM(arguments.ptr(), positions[i]), 0, 0, counted[i]});
      if (!ask(rows_.back(), &rows_.back().address, &rows_.back().version)) throw py::error_already_set();
    }
  }

  // The same objects, each where it was and as often edited.
  bool same(const py::tuple& arguments) const {
    const auto given = static_cast<size_t>(PyTuple_GET_SIZE(arguments.ptr()));
    for (const Row& row : rows_)
      if (row.position >= given || PyTuple_GET_ITEM(arguments.ptr(), row.position) != row.object) return false;
    for (const Row& row : rows_) {
      int64_t address = 0, version = 0;
      if (!ask(row, &address, &version)) {
        PyErr_Clear();  // what cannot be asked any more is not what it was; whoever looks closer gets the error
        return false;
      }
      if (address != row.address || version != row.version) return false;
    }
    return true;
  }

 private:
  struct Row {
    size_t position;
    PyObject* object;
    int64_t address, version;
    bool counted;
  };

  bool ask(const Row& row, int64_t* address, int64_t* version) const {
    if (!number(PyObject_CallOneArg(address_of_.ptr(), row.object), address)) return false;
    PyObject* property = version_of_.ptr();
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(row.object));
    return !row.counted || number(Py_TYPE(property)->tp_descr_get(property, row.object, type), version);
  }

  static bool number(PyObject* value, int64_t* out) {
    if (!value) return false;
    *out = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(value));
    Py_DECREF(value);
    return !PyErr_Occurred();
  }

  py::object address_of_, version_of_;
  std::vector<Row> rows_;
};

}  // namespace llmopt
