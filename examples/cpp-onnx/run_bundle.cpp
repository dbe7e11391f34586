// Generate from the golden noise of a bundle in fp32: run_bundle BUNDLE OUT.f32
//
// What happens at a step, and why, is in docs/bundle-format.md.
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "graph.hpp"
using nlohmann::json;
using Pairs = std::vector<std::pair<std::string, std::string>>;
using Terms = std::vector<std::pair<size_t, float>>;
using Values = std::vector<float>;
const std::map<std::string, std::string> kStored = {
    {"F32", "float32"}, {"I64", "int64"}, {"I32", "int32"}, {"BOOL", "bool"}};

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The tensors of a safetensors file.
Tensors tensors_of(const std::string& path) {
  const std::string data = read(path);
  const uint64_t begin = 8 + *reinterpret_cast<const uint64_t*>(data.data());
  const json header = json::parse(data.substr(8, begin - 8));
  Tensors found;
  for (const auto& [name, entry] : header.items())
    if (name != "__metadata__")
      found[name] = Tensor(kStored.at(entry["dtype"]), entry["shape"],
                           data.data() + begin + entry["data_offsets"][0].get<size_t>());
  return found;
}

int main(int, char** arguments) {
  const std::string root = arguments[1] + std::string("/");
  const json m = json::parse(read(root + "manifest.json")), sampler = m["stepping"];
  const Tensors golden = tensors_of(root + m["golden"].get<std::string>());
  Tensors given, once, slots;
  for (const auto& [name, tensor] : golden)
    if (name.rfind("inputs/", 0) == 0) given[name.substr(7)] = tensor;
  std::map<std::string, Graph> loaded;
  Tensors results;  // of the last graph
  const auto run = [&](const json& graph, const Tensors& held) {  // returns what it writes, by slot
    const std::string file = graph["file"];
    Tensors inputs, found;
    for (const std::string name : graph["inputs"]) inputs[name] = given.at(name);
    for (const auto& [slot, name] : graph["reads"].get<Pairs>()) inputs[name] = held.at(slot);
    results = loaded.try_emplace(file, root + file).first->second.run(inputs);
    for (const auto& [slot, name] : graph["writes"].get<Pairs>()) found[slot] = results.at(name);
    return found;
  };
  if (!m["hoisted"].is_null()) once = run(m["hoisted"], {});

  const std::string layout = m["sampler"]["cfg_layout"], timestep = m["timestep"];
  if (!m["second"].is_null()) throw std::runtime_error("guidance in two calls a step");
  if (m["sampler"].contains("phases")) throw std::runtime_error("guidance at some steps only");
  const int halves = layout == "none" ? 1 : 2;
  const Tensor& noise = golden.at("noise");
  Values latents(noise.data<float>(), noise.data<float>() + noise.size());
  for (float& value : latents) value *= sampler["noise_scale"].get<float>();
  const size_t images = noise.shape[0], each = latents.size() / images, batch = images * halves;
  std::vector<size_t> shape = noise.shape;
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
    Tensor rows("float32", shape);
    for (size_t i = 0; i < rows.size(); ++i)
      rows.data<float>()[i] = seen["latents"].back()[i % latents.size()] * input_scale;
    given[m["latent"]] = rows;
    for (const json& input : m["inputs"]) {
      if (input["name"] != timestep) continue;
      Tensor at(input["dtype"], std::vector<size_t>(input["shape"].size(), batch));
      for (size_t i = 0; i < at.size(); ++i)
        if (at.dtype == "int64") at.data<int64_t>()[i] = how["timestep"].get<double>();
        else at.data<float>()[i] = how["timestep"];
      given[timestep] = at;
    }
    Tensors held = once;
    held.insert(slots.begin(), slots.end());
    for (const auto& [slot, factor] : m["factors"][step].items()) {
      const float number = factor;
      held[slot] = Tensor("float32", {}, &number);
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

    const Tensor out = results.at(m["outputs"][0]["name"]);
    const size_t row = out.size() / batch;  // a learned variance comes after the channels
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
