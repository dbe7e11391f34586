// Generate by OpenVINO alone, from the golden noise of a bundle in fp32: run_bundle BUNDLE OUT.f32
//
// What happens at a step, and why, is in docs/bundle-format.md.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>
using nlohmann::json;
using Pairs = std::vector<std::pair<std::string, std::string>>;
using Tensors = std::map<std::string, ov::Tensor>;
using Terms = std::vector<std::pair<size_t, float>>;
using Values = std::vector<float>;
const std::map<std::string, ov::element::Type> kTypes = {
    {"F32", ov::element::f32}, {"float32", ov::element::f32}, {"I64", ov::element::i64},
    {"int64", ov::element::i64}, {"I32", ov::element::i32}, {"BOOL", ov::element::boolean}};

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

int main(int, char** arguments) {
  const std::string root = arguments[1] + std::string("/");
  const json m = json::parse(read(root + "manifest.json")), sampler = m["stepping"];
  const std::string data = read(root + m["golden"].get<std::string>());
  const uint64_t begin = 8 + *reinterpret_cast<const uint64_t*>(data.data());
  Tensors golden, given, once, slots;
  const json header = json::parse(data.substr(8, begin - 8));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    ov::Tensor made(kTypes.at(entry["dtype"]), entry["shape"].get<ov::Shape>());
    const size_t at = begin + entry["data_offsets"][0].get<size_t>();
    std::memcpy(made.data(), data.data() + at, made.get_byte_size());
    (name.rfind("inputs/", 0) == 0 ? given[name.substr(7)] : golden[name]) = made;
  }
  ov::Core core;  // by default a CPU that has bfloat16 computes in that
  core.set_property("CPU", ov::hint::execution_mode(ov::hint::ExecutionMode::ACCURACY));
  std::map<std::string, ov::InferRequest> loaded;
  const auto run = [&](const json& graph, const Tensors& held) {  // returns what it writes, by slot
    ov::InferRequest& request = loaded[graph["file"]];
    const std::string path = root + graph["file"].get<std::string>();
    if (!request) request = core.compile_model(path, "CPU").create_infer_request();
    for (const std::string name : graph["inputs"]) request.set_tensor(name, given.at(name));
    for (const auto& [slot, name] : graph["reads"].get<Pairs>())
      request.set_tensor(name, held.at(slot));
    request.infer();
    Tensors found;
    for (const auto& [slot, name] : graph["writes"].get<Pairs>()) {
      const ov::Tensor out = request.get_tensor(name);
      out.copy_to(found[slot] = ov::Tensor(out.get_element_type(), out.get_shape()));
    }
    return found;
  };
  if (!m["hoisted"].is_null()) once = run(m["hoisted"], {});

  const std::string layout = m["sampler"]["cfg_layout"], timestep = m["timestep"];
  if (!m["second"].is_null()) throw std::runtime_error("guidance in two calls a step");
  const int halves = layout == "none" ? 1 : 2;
  ov::Shape shape = golden["noise"].get_shape();
  const float* noise = golden["noise"].data<float>();
  Values latents(noise, noise + golden["noise"].get_size());
  for (float& value : latents) value *= sampler["noise_scale"].get<float>();
  const size_t images = shape[0], each = latents.size() / images, batch = images * halves;
  shape[0] = batch;
  std::map<std::string, std::vector<Values>> seen = {{"latents", {latents}}};
  const auto total = [&](const json& terms) {  // of what each sequence held some steps ago
    Values sum(latents.size());
    for (const auto& [name, known] : seen)
      for (const auto& [ago, factor] : terms.value(name, json::array()).get<Terms>())
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += factor * known[known.size() - 1 - ago][i];
    return sum;
  };
  for (size_t step = 0; step < m["schedule"].size(); ++step) {
    const json how = sampler["steps"][step];
    const json graph = m["variants"][m["schedule"][step].get<size_t>()];
    const float input_scale = how["input_scale"];
    ov::Tensor rows(ov::element::f32, shape);
    for (size_t i = 0; i < rows.get_size(); ++i)
      rows.data<float>()[i] = seen["latents"].back()[i % latents.size()] * input_scale;
    given[m["latent"]] = rows;
    for (const json& input : m["inputs"]) {
      if (input["name"] != timestep) continue;
      const bool whole = input["dtype"] == "int64";
      ov::Tensor at(kTypes.at(input["dtype"]), ov::Shape(input["shape"].size(), batch));
      for (size_t i = 0; i < at.get_size(); ++i)
        if (whole) at.data<int64_t>()[i] = static_cast<int64_t>(how["timestep"].get<double>());
        else at.data<float>()[i] = how["timestep"];
      given[timestep] = at;
    }
    Tensors held = once;
    held.insert(slots.begin(), slots.end());
    for (const auto& [slot, factor] : m["factors"][step].items()) {
      held[slot] = ov::Tensor(ov::element::f32, {});
      *held[slot].data<float>() = factor;
    }
    Tensors next = slots, kept;
    const Tensors written = run(graph, held);
    for (const json& slot : m["slots"])  // caches that change their names
      for (const json& life : slot["lives"])
        if (slot["source"] != "" && life[0] == step) next[slot["name"]] = slots.at(slot["source"]);
    for (const auto& [slot, tensor] : written) next[slot] = tensor;
    for (const json& slot : m["slots"])
      for (const json& life : slot["lives"])
        if (life[0] <= step && step < life[1]) kept[slot["name"]] = next.at(slot["name"]);
    slots = kept;

    const ov::Tensor out = loaded[graph["file"]].get_tensor(m["outputs"][0]["name"]);
    const size_t row = out.get_size() / batch;  // a learned variance comes after the channels
    const size_t first = layout == "uncond-first" ? images : 0, second = images - first;
    Values output(latents.size());
    for (size_t i = 0; i < output.size(); ++i) {
      const float* from = out.data<float>() + i / each * row + i % each;
      const float cond = from[first * row], other = from[halves == 2 ? second * row : 0];
      const float scale = halves == 2 ? sampler["guidance_scale"].get<float>() : 1.0f;
      output[i] = other + scale * (cond - other);
    }
    seen["outputs"].push_back(output);
    Values clipped(latents.size());
    if (const json& clip = how["clip"]; !clip.is_null()) {
      clipped = total(clip);
      const float low = clip["low"], high = clip["high"];
      for (float& value : clipped) value = std::clamp(value, low, high);
    }
    seen["clipped"].push_back(clipped);
    seen["latents"].push_back(total(how));
  }
  const Values& last = seen["latents"].back();
  std::ofstream out(arguments[2], std::ios::binary);
  out.write(reinterpret_cast<const char*>(last.data()), last.size() * sizeof(float));
}
