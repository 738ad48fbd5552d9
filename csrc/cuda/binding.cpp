// Python binding of rmcore._cuda. Only translates: pointers and streams cross as integers, names as enumerators.
#include <pybind11/pybind11.h>

#include <string>

#include "device.h"
#include "int8_stream.h"
#include "mid.h"
#include "power_iteration.h"
#include "score.h"
#include "sources_digest.h"  // made by the build

namespace py = pybind11;
using namespace rmcore::cuda;

namespace {

Scalar scalar(const std::string& name) {
  if (name == "float16") return Scalar::kFloat16;
  if (name == "bfloat16") return Scalar::kBFloat16;
  if (name == "float32") return Scalar::kFloat32;
  throw py::value_error("dtype: got " + name + ", expected float16, bfloat16 or float32");
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict describe(int device) {
  const Properties& p = properties(device);
  py::dict out;
  out["name"] = p.name;
  out["capability"] = py::make_tuple(p.major, p.minor);
  out["multiprocessors"] = p.multiprocessors;
  out["shared_bytes"] = p.shared_bytes;
  out["l2_bytes"] = p.l2_bytes;
  out["memory_bytes"] = p.memory_bytes;
  out["cooperative"] = p.cooperative != 0;
  return out;
}

Head make_head(const std::string& dtype, int hidden_size, int num_features, int layer_size, uintptr_t projection,
               int64_t projection_pitch, uintptr_t phase, uintptr_t layer, int64_t layer_pitch, uintptr_t layer_bias,
               uintptr_t beta, uintptr_t factor, bool tanh, bool layernorm, bool linear, float input_scale, float beta0,
               float factor_scale, float amplitude) {
  Head head{};
  head.dtype = scalar(dtype);
  head.hidden_size = hidden_size;
  head.num_features = num_features;
  head.layer_size = layer_size;
  head.projection = pointer<void>(projection);
  head.projection_pitch = projection_pitch;
  head.phase = pointer<float>(phase);
  head.layer = pointer<void>(layer);
  head.layer_pitch = layer_pitch;
  head.layer_bias = pointer<float>(layer_bias);
  head.beta = pointer<float>(beta);
  head.factor = pointer<void>(factor);
  head.tanh = tanh;
  head.layernorm = layernorm;
  head.linear = linear;
  head.input_scale = input_scale;
  head.beta0 = beta0;
  head.factor_scale = factor_scale;
  head.amplitude = amplitude;
  return head;
}

Int8Head make_int8_head(int hidden_size, int num_features, uintptr_t projection, int64_t projection_pitch,
                        uintptr_t projection_scale, uintptr_t phase, uintptr_t beta, uintptr_t factor,
                        uintptr_t factor_scales, uintptr_t diagonal, uintptr_t hidden_shift, uintptr_t hidden_balance,
                        float input_scale, float beta0, float factor_scale, float amplitude) {
  Int8Head head{};
  head.hidden_size = hidden_size;
  head.num_features = num_features;
  head.projection = pointer<int8_t>(projection);
  head.projection_pitch = projection_pitch;
  head.projection_scale = pointer<float>(projection_scale);
  head.phase = pointer<float>(phase);
  head.beta = pointer<float>(beta);
  head.factor = pointer<int8_t>(factor);
  head.factor_scales = pointer<float>(factor_scales);
  head.diagonal = pointer<float>(diagonal);
  head.hidden_shift = pointer<float>(hidden_shift);
  head.hidden_balance = pointer<float>(hidden_balance);
  head.input_scale = input_scale;
  head.beta0 = beta0;
  head.factor_scale = factor_scale;
  head.amplitude = amplitude;
  return head;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA latency kernels of rmcore. Importing needs no GPU and no driver.";
  m.attr("MAX_ROWS") = kMaxRows;
  m.attr("SOURCES") = RMCORE_CUDA_SOURCES;
  m.attr("SOURCES_INT8") = RMCORE_CUDA_SOURCES_INT8;
  m.attr("SOURCES_MID") = RMCORE_CUDA_SOURCES_MID;
  py::register_exception<BarrierTimeout>(m, "BarrierTimeout", PyExc_RuntimeError);
  m.def("check_barriers", &check_barriers,
        "Raises BarrierTimeout where a launch since the last call gave up waiting for a thread block.");
  m.def("device_count", &device_count, "Devices this process can use; 0 without a driver.");
  m.def("properties", &describe, py::arg("device"), "What the kernels' layout depends on, as a dict.");
  m.def("max_power_columns", &max_power_columns, py::arg("element_bytes"), "Widest matrix of power_iteration.");

  py::class_<Head>(m, "Head", "Pointers and constants of a frozen head; the tensors must outlive it.")
      .def(py::init(&make_head), py::kw_only(), py::arg("dtype"), py::arg("hidden_size"), py::arg("num_features"),
           py::arg("layer_size"), py::arg("projection"), py::arg("projection_pitch"), py::arg("phase"),
           py::arg("layer"), py::arg("layer_pitch"), py::arg("layer_bias"), py::arg("beta"), py::arg("factor"),
           py::arg("tanh"), py::arg("layernorm"), py::arg("linear"), py::arg("input_scale"), py::arg("beta0"),
           py::arg("factor_scale"), py::arg("amplitude"));
  py::class_<ScorePlan>(m, "ScorePlan", "How a batch of up to `tiles` · 8 rows is laid out on a device.")
      .def(py::init(&plan_score_on), py::arg("head"), py::arg("rows"), py::arg("device"), py::arg("streamed") = true)
      .def_property_readonly("streamed", [](const ScorePlan& plan) { return plan.stream.slots > 0; })
      .def_readonly("tiles", &ScorePlan::tiles)
      .def_property_readonly("grid", [](const ScorePlan& p) { return p.stream.slots > 0 ? p.stream.grid : p.grid; })
      .def_property_readonly("slots", [](const ScorePlan& p) { return p.stream.slots > 0 ? p.stream.slots : p.slots; })
      .def_property_readonly(
          "shared_bytes",
          [](const ScorePlan& p) { return p.stream.slots > 0 ? p.stream.shared_bytes : p.shared_bytes; })
      .def_readonly("workspace_bytes", &ScorePlan::bytes);
  m.def(
      "score",
      [](const Head& head, const ScorePlan& plan, uintptr_t hidden, const std::string& dtype, int64_t stride, int rows,
         uintptr_t out, uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
        launch_score(head, plan, pointer<void>(hidden), scalar(dtype), stride, rows, pointer<float>(out),
                     pointer<void>(workspace), workspace_bytes, device, stream);
      },
      py::arg("head"), py::arg("plan"), py::arg("hidden"), py::arg("dtype"), py::arg("stride"), py::arg("rows"),
      py::arg("out"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"),
      "Scores `rows` hidden rows into out (4, rows) float32, in stream order.");

  py::class_<Int8Head>(m, "Int8Head", "Pointers and constants of a frozen int8 head; the tensors must outlive it.")
      .def(py::init(&make_int8_head), py::kw_only(), py::arg("hidden_size"), py::arg("num_features"),
           py::arg("projection"), py::arg("projection_pitch"), py::arg("projection_scale"), py::arg("phase"),
           py::arg("beta"), py::arg("factor"), py::arg("factor_scales"), py::arg("diagonal"), py::arg("hidden_shift"),
           py::arg("hidden_balance"), py::arg("input_scale"), py::arg("beta0"), py::arg("factor_scale"),
           py::arg("amplitude"));
  py::class_<StreamPlan>(m, "Int8Plan", "How a batch of an int8 head is laid out on a device; no slots: not served.")
      .def(py::init(&plan_int8_on), py::arg("head"), py::arg("rows"), py::arg("device"))
      .def_readonly("grid", &StreamPlan::grid)
      .def_readonly("slots", &StreamPlan::slots)
      .def_readonly("shared_bytes", &StreamPlan::shared_bytes)
      .def_readonly("workspace_bytes", &StreamPlan::bytes);
  m.def(
      "score_int8",
      [](const Int8Head& head, const StreamPlan& plan, uintptr_t hidden, const std::string& dtype, int64_t stride,
         int rows, uintptr_t out, uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
        launch_int8(head, plan, pointer<void>(hidden), scalar(dtype), stride, rows, pointer<float>(out),
                    pointer<void>(workspace), workspace_bytes, device, stream);
      },
      py::arg("head"), py::arg("plan"), py::arg("hidden"), py::arg("dtype"), py::arg("stride"), py::arg("rows"),
      py::arg("out"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"),
      "Scores `rows` hidden rows with an int8 head into out (4, rows) float32, in stream order.");

  py::class_<MidHead>(m, "MidHead", "A head and the tensor maps of its weights, for score_mid.")
      .def(py::init(&mid_head), py::arg("head"));
  py::class_<MidPlan>(m, "MidPlan",
                      "How a batch of exactly `rows` rows is laid out on a device; columns 0: not served.")
      .def(py::init(&plan_mid_on), py::arg("head"), py::arg("rows"), py::arg("device"))
      .def_property_readonly("columns", [](const MidPlan& plan) { return plan.shape.columns; })
      .def_property_readonly("groups", [](const MidPlan& plan) { return plan.shape.groups; })
      .def_property_readonly("clusters", [](const MidPlan& plan) { return plan.shape.clusters; })
      .def_readonly("slots", &MidPlan::slots)
      .def_readonly("shared_bytes", &MidPlan::shared_bytes)
      .def_readonly("workspace_bytes", &MidPlan::bytes);
  m.def(
      "score_mid",
      [](const MidHead& head, const MidPlan& plan, uintptr_t hidden, const std::string& dtype, int64_t stride, int rows,
         uintptr_t out, uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
        if (scalar(dtype) != head.head.dtype) throw py::value_error("dtype: got " + dtype + ", not that of the head");
        launch_mid(head, plan, pointer<void>(hidden), stride, rows, pointer<float>(out), pointer<void>(workspace),
                   workspace_bytes, device, stream);
      },
      py::arg("head"), py::arg("plan"), py::arg("hidden"), py::arg("dtype"), py::arg("stride"), py::arg("rows"),
      py::arg("out"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"),
      "Scores 65 to 512 hidden rows of the head's dtype into out (4, rows) float32, in stream order.");

  py::class_<PowerPlan>(m, "PowerPlan", "How a power iteration is laid out on a device.")
      .def(py::init(&plan_power_on), py::arg("rows"), py::arg("columns"), py::arg("element_bytes"), py::arg("device"))
      .def_readonly("grid", &PowerPlan::grid)
      .def_readonly("slots", &PowerPlan::slots)
      .def_readonly("shared_bytes", &PowerPlan::shared_bytes)
      .def_readonly("workspace_bytes", &PowerPlan::bytes);
  m.def(
      "power_iteration",
      [](const PowerPlan& plan, const std::string& dtype, uintptr_t weight, int64_t pitch, int rows, int columns,
         uintptr_t vector, int iterations, uintptr_t sigma, uintptr_t result, uintptr_t workspace,
         int64_t workspace_bytes, int device, uintptr_t stream) {
        launch_power(plan, scalar(dtype), pointer<void>(weight), pitch, rows, columns, pointer<float>(vector),
                     iterations, pointer<float>(sigma), pointer<float>(result), pointer<void>(workspace),
                     workspace_bytes, device, stream);
      },
      py::arg("plan"), py::arg("dtype"), py::arg("weight"), py::arg("pitch"), py::arg("rows"), py::arg("columns"),
      py::arg("vector"), py::arg("iterations"), py::arg("sigma"), py::arg("result"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"),
      "σ and the new v after `iterations` steps, in stream order.");
}
