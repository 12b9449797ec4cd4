// The Python module llmopt._C: tiers, memory, programs. Only this file and those in python/ see Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "gpu/launches.h"
#include "python/arguments.h"
#include "python/module_facts.h"
#include "runtime/dlpack.h"
#include "runtime/prefetch.h"
#include "runtime/program.h"
#include "runtime/samples.h"

namespace py = pybind11;
using namespace llmopt;

namespace {

using OperandTuple = std::tuple<int, int, ExprId, std::vector<ExprId>, std::vector<ExprId>>;
using StepTuple = std::tuple<std::string, std::vector<OperandTuple>, std::vector<ExprId>, std::vector<float>>;

std::unique_ptr<Program> make_program(const std::string& tier_name, int num_symbols, int num_externals,
                                      std::vector<std::vector<int64_t>> exprs, std::vector<std::vector<ExprId>> slots,
                                      const std::vector<std::pair<bool, int>>& buffers,
                                      const std::vector<StepTuple>& steps) {
  std::vector<Buffer> buffer_rows;
  for (auto [external, index] : buffers) buffer_rows.push_back({external, index});
  std::vector<StepSpec> specs;
  for (const auto& [op, operands, ints, floats] : steps) {
    StepSpec spec{op, {}, ints, floats};
    for (const auto& [buffer, dtype, offset, size, stride] : operands)
      spec.operands.push_back({buffer, static_cast<DType>(dtype), offset, size, stride});
    specs.push_back(std::move(spec));
  }
  return std::make_unique<Program>(tier(tier_name), num_symbols, num_externals, std::move(exprs), std::move(slots),
                                   std::move(buffer_rows), std::move(specs));
}

void run_program(Program& p, const std::vector<int64_t>& externals, const std::vector<int64_t>& symbols, int threads) {
  py::gil_scoped_release release;
  p.run(externals, symbols, threads, nullptr);
}

std::vector<int64_t> profile_program(Program& p, const std::vector<int64_t>& externals,
                                     const std::vector<int64_t>& symbols, int threads) {
  std::vector<int64_t> step_ns;
  py::gil_scoped_release release;
  p.run(externals, symbols, threads, &step_ns);
  return step_ns;
}

std::vector<std::string> tier_names(bool supported_only) {
  std::vector<std::string> names;
  for (const Tier& t : tiers())
    if (!supported_only || t.supported()) names.push_back(t.name);
  return names;
}

std::vector<std::string> tier_ops(const std::string& name) {
  std::vector<std::string> ops;
  for (const KernelFamily* family : tier(name).families)
    for (int i = 0; i < family->count; ++i) ops.push_back(family->kernels[i].op);
  return ops;
}

std::string refuse(const std::string& tier_name, const std::string& op, const std::vector<int64_t>& ints) {
  const Tier& t = tier(tier_name);
  const Step step{nullptr, ints.data(), nullptr, 0, static_cast<int32_t>(ints.size()), 0};
  const char* reason = refuse_tuning(op.c_str(), {step, nullptr, t.panel_width(), t.tile_rows(op), nullptr});
  return reason ? reason : "";
}

// nullptr for what is no exchange functions of DLPack 1.
const dlpack::Exchange* exchange_in(const py::object& capsule) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
  const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  while (found && found->major != 1) found = found->older;
  return found && found->look_at ? found : nullptr;  // the one that DLPack lets a library leave out
}

const dlpack::Exchange* known_exchange(const py::object& capsule) {
  if (const dlpack::Exchange* known = exchange_in(capsule)) return known;
  throw std::invalid_argument("the exchange functions are not those of DLPack 1");
}

std::unique_ptr<ModuleFacts> make_facts(const std::vector<std::tuple<int, py::object, int, py::object>>& rows,
                                        std::vector<std::pair<size_t, size_t>> same, const py::object& exchange,
                                        const py::tuple& tensors, py::object requires_grad) {
  std::vector<Fact> facts;
  for (const auto& [owner, key, kind, expected] : rows)
    facts.push_back({owner, key, static_cast<FactKind>(kind), expected});
  return std::make_unique<ModuleFacts>(std::move(facts), std::move(same), known_exchange(exchange), tensors,
                                       std::move(requires_grad));
}

std::unique_ptr<dlpack::Parts> make_parts(const py::object& exchange, const py::object& tensor) {
  const dlpack::Exchange* known = known_exchange(exchange);
  dlpack::ManagedArray* memory = nullptr;
  if (known->from_object(tensor.ptr(), &memory)) throw py::error_already_set();
  return std::make_unique<dlpack::Parts>(known, memory);
}

py::list over_parts(dlpack::Parts& parts, int64_t count, int64_t start, int64_t step, const std::vector<int64_t>& size,
                    const std::vector<int64_t>& stride) {
  py::list tensors;
  const auto take = [&](void* object) {
    tensors.append(py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)));
  };
  if (!parts.over(count, start, step, size, stride, take)) throw py::error_already_set();
  return tensors;
}

bool parts_hold(const dlpack::Parts& parts, const py::tuple& tensors, int64_t start, int64_t step,
                const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  auto* objects = reinterpret_cast<void**>(&PyTuple_GET_ITEM(tensors.ptr(), 0));
  const bool held = parts.hold(objects, static_cast<int64_t>(tensors.size()), start, step, size, stride);
  PyErr_Clear();  // what cannot be looked at is not what was made
  return held;
}

using Place = std::tuple<uint32_t, uint32_t, int64_t>;  // slot, buffer, offset

void bind_gpu(py::module_& m) {
  using namespace gpu;
  py::class_<Matrix>(m, "Matrix", "A matrix that the copy engine of a GPU reads in boxes.")
      .def(py::init([](Place place, int data_type, int swizzle, uint64_t rows, uint64_t columns, uint64_t row_bytes,
                       uint32_t box_rows, uint32_t box_columns) {
             const auto [slot, buffer, offset] = place;
             return Matrix{slot, buffer, offset, data_type, swizzle, rows, columns, row_bytes, box_rows, box_columns};
           }),
           py::arg("place"), py::arg("data_type"), py::arg("swizzle"), py::arg("rows"), py::arg("columns"),
           py::arg("row_bytes"), py::arg("box_rows"), py::arg("box_columns"));
  py::class_<Launches, std::shared_ptr<Launches>>(m, "Launches", "The launches of one step of a GPU plan.")
      .def(py::init<>())
      .def(
          "add",
          [](Launches& self, std::string kernel, uint64_t function, const std::vector<unsigned>& grid, unsigned threads,
             unsigned shared_bytes, const std::vector<uint64_t>& slots, std::vector<uint32_t> parameters,
             const std::vector<Place>& places, std::vector<Matrix> matrices) {
            std::vector<Relocation> relocations;
            for (const auto& [slot, buffer, offset] : places) relocations.push_back({slot, buffer, offset});
            self.add(std::move(kernel), function, grid, threads, shared_bytes, slots, std::move(parameters),
                     std::move(relocations), std::move(matrices));
          },
          py::arg("kernel"), py::arg("function"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"),
          py::arg("slots"), py::arg("parameters"), py::arg("places"), py::arg("matrices"))
      .def("over", &Launches::over, py::arg("renamed"), "The same launches over other buffers: (number, new number).");
  py::class_<LaunchPlan>(m, "LaunchPlan", "The steps of one call on a GPU.")
      .def(py::init([](const std::vector<std::shared_ptr<Launches>>& steps) {
             return LaunchPlan({steps.begin(), steps.end()});
           }),
           py::arg("steps"))
      .def("run", &LaunchPlan::run, py::arg("device"), py::arg("stream"), py::arg("addresses"),
           py::call_guard<py::gil_scoped_release>());
  m.def("parameter_bytes", &parameter_bytes, py::arg("function"),
        "The bytes of each parameter of a compiled GPU kernel.");
  m.def("open_gpu_driver", &open_driver, py::arg("library"), "Takes this library for the GPU's driver; for tests.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of llmopt: CPU kernels and the plan executor.";
  m.def("tiers", &tier_names, py::arg("supported_only") = true, "CPU tiers, best first.");
  m.def("tier_ops", &tier_ops, py::arg("tier"), "Names of the ops a tier has kernels for.");
  m.def(
      "panel_width", [](const std::string& t) { return tier(t).panel_width(); }, py::arg("tier"),
      "Columns of one packed weight panel (NR) in a tier.");
  m.def(
      "tile_rows", [](const std::string& t, const std::string& op) { return tier(t).tile_rows(op); }, py::arg("tier"),
      py::arg("op"), "Rows of the largest register tile (MR) of an op over packed weights in a tier; 0 for other ops.");
  m.def("refuse_tuning", &refuse, py::arg("tier"), py::arg("op"), py::arg("ints"),
        "Why a step of an op cannot run with the tuning in its ints; '' when it can.");
  py::class_<Memory>(m, "Memory", "Zeroed, aligned memory; huge pages when large.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_property_readonly("address", [](const Memory& a) { return reinterpret_cast<int64_t>(a.data()); })
      .def_property_readonly("bytes", &Memory::bytes);
  py::class_<Samples>(m, "Samples", "Remembers a few cache lines of each of several memory ranges.")
      .def(py::init<std::vector<int64_t>, std::vector<int64_t>>(), py::arg("addresses"), py::arg("bytes"))
      .def("fetch", &Samples::fetch)
      .def("unchanged", &Samples::unchanged);
  py::class_<Content, std::shared_ptr<Content>>(m, "Content", "Remembers digests of all content of memory ranges.")
      .def(py::init<std::vector<int64_t>, std::vector<int64_t>>(), py::arg("addresses"), py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("windows", &Content::windows)
      .def("all_unchanged", &Content::all_unchanged, py::call_guard<py::gil_scoped_release>());
  py::class_<Sweep>(m, "Sweep", "Looks at the windows of several contents, one a call.")
      .def(py::init([](const std::vector<std::shared_ptr<Content>>& contents) {
             return std::make_unique<Sweep>(
                 std::vector<std::shared_ptr<const Content>>(contents.begin(), contents.end()));
           }),
           py::arg("contents"))
      .def("unchanged", &Sweep::unchanged);
  py::class_<Prefetch>(m, "Prefetch", "Asks for several memory ranges without waiting for them.")
      .def(py::init<std::vector<int64_t>, std::vector<int64_t>>(), py::arg("addresses"), py::arg("bytes"))
      .def("fetch", &Prefetch::fetch);
  py::class_<Arguments>(m, "Arguments", "Where some of a call's arguments were, and how often they had been edited.")
      .def(py::init<py::tuple, std::vector<size_t>, py::object, py::object, std::vector<bool>>(), py::arg("arguments"),
           py::arg("positions"), py::arg("address_of"), py::arg("version_of"), py::arg("counted"))
      .def("same", &Arguments::same, py::arg("arguments"));
  py::class_<ModuleFacts>(m, "ModuleFacts", "What a module and the objects below it have to hold.")
      .def(py::init(&make_facts), py::arg("facts"), py::arg("same"), py::arg("exchange"), py::arg("tensors"),
           py::arg("requires_grad"))
      .def("hold", &ModuleFacts::hold, py::arg("root"), py::arg("known"))
      .def("tensors", &ModuleFacts::tensors, py::arg("root"))
      .def("memory", &ModuleFacts::memory, py::arg("root"));
  py::class_<ArgumentOrder>(m, "ArgumentOrder",
                            "Of a graph's arguments some come with a call, and a module holds others.")
      .def(py::init<std::vector<int>>(), py::arg("places"))
      .def("all", &ArgumentOrder::all, py::arg("held"), py::arg("given"));
  m.def(
      "knows_exchange", [](const py::object& exchange) { return exchange_in(exchange) != nullptr; },
      py::arg("exchange"), "Whether these are exchange functions that Parts can use.");
  py::class_<dlpack::Parts>(m, "Parts", "Tensors over parts of another tensor's memory, which they keep alive.")
      .def(py::init(&make_parts), py::arg("exchange"), py::arg("tensor"))
      .def("over", &over_parts, py::arg("count"), py::arg("start"), py::arg("step"), py::arg("size"), py::arg("stride"),
           "Tensor i begins at element start + i * step, in a storage of its own.")
      .def("hold", &parts_hold, py::arg("tensors"), py::arg("start"), py::arg("step"), py::arg("size"),
           py::arg("stride"), "Whether these are tensors that `over` makes of the same numbers.");
  py::class_<Program>(m, "Program", "A native segment of a plan.")
      .def(py::init(&make_program), py::arg("tier"), py::arg("num_symbols"), py::arg("num_externals"), py::arg("exprs"),
           py::arg("slots"), py::arg("buffers"), py::arg("steps"))
      .def("run", &run_program, py::arg("externals"), py::arg("symbols"), py::arg("threads"))
      .def("profile", &profile_program, py::arg("externals"), py::arg("symbols"), py::arg("threads"),
           "Like run; returns nanoseconds per step.")
      .def("sizes", &Program::sizes, py::arg("symbols"), py::arg("wanted"), "The values of some size expressions.")
      .def_property_readonly("num_steps", &Program::num_steps)
      .def_property_readonly("barriers", &Program::barriers)
      .def_property_readonly("arena_bytes", &Program::arena_bytes);
  bind_gpu(m);
}
