// Run a whole generation by a bundle of AOTInductor packages, without Python.
//
//   generate BUNDLE INPUTS.safetensors LATENTS.safetensors
//
// INPUTS holds standard normal `noise`, a row per image, and the model's other arguments as it takes
// them, both halves of guidance. What the sampler does between the calls is in the manifest, as sums of
// earlier latents, outputs and clipped estimates: see docs/bundle-format.md.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <c10/core/InferenceMode.h>
#include <torch/headeronly/version.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

using nlohmann::json;
using Tensors = std::map<std::string, at::Tensor>;
using torch::inductor::AOTIModelPackageLoader;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

const std::map<std::string, at::ScalarType> kDtypes = {
    {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"F64", at::kDouble},
    {"I64", at::kLong},  {"I32", at::kInt},  {"BOOL", at::kBool},     {"U8", at::kByte}};
const std::map<std::string, at::ScalarType> kNames = {
    {"float32", at::kFloat}, {"float16", at::kHalf},  {"bfloat16", at::kBFloat16},
    {"float64", at::kDouble}, {"int64", at::kLong},   {"int32", at::kInt},
    {"bool", at::kBool},      {"uint8", at::kByte}};

// safetensors: the length of a JSON header, the header, and the bytes that it places.
Tensors read_tensors(const std::string& path) {
  const std::string content = read_file(path);
  uint64_t length = 0;
  if (content.size() < 8) refuse(path + ": not a safetensors file");
  std::memcpy(&length, content.data(), 8);
  const json header = json::parse(content.substr(8, length));
  Tensors found;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto sizes = entry["shape"].get<std::vector<int64_t>>();
    at::Tensor tensor = at::empty(sizes, at::dtype(kDtypes.at(entry["dtype"])));
    const uint64_t start = entry["data_offsets"][0];
    std::memcpy(tensor.data_ptr(), content.data() + 8 + length + start, tensor.nbytes());
    found[name] = tensor;
  }
  return found;
}

void write_latents(const std::string& path, const at::Tensor& latents) {
  const at::Tensor plain = latents.to(at::kFloat).contiguous();
  json header;
  header["latents"] = {{"dtype", "F32"},
                       {"shape", plain.sizes().vec()},
                       {"data_offsets", {0, plain.nbytes()}}};
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << text;
  file.write(static_cast<const char*>(plain.data_ptr()), plain.nbytes());
  if (!file) refuse(path + ": cannot be written");
}

// The steps of a bundle: packages, or lists of calls of packages, over shared weights.
class Bundle {
 public:
  explicit Bundle(const std::string& folder) : folder_(folder) {
    manifest = json::parse(read_file(folder + "/manifest.json"));
    if (manifest.value("packages", json()).is_null())
      refuse("the bundle holds ONNX graphs; export it with --format pt2");
    const std::string wanted = manifest["packages"]["target"]["torch"];
    const std::string base = wanted.substr(0, wanted.find('+'));
    if (base != TORCH_VERSION)
      refuse("the packages are for torch " + wanted + ", and this is " + TORCH_VERSION);
    weights_ = read_tensors(folder + "/" + manifest["weights"].get<std::string>());
    for (const auto& [file, spec] : manifest["packages"]["files"].items()) {
      auto loader = std::make_unique<AOTIModelPackageLoader>(folder + "/" + file);
      std::unordered_map<std::string, at::Tensor> constants;
      for (const std::string name : spec["constants"]) constants[name] = weights_.at(name);
      // Pointers alone are kept; a constant left out is an error.
      if (!constants.empty())
        loader->load_constants(constants, false, /*check_full_update=*/true, /*user_managed=*/true);
      packages_[file] = std::move(loader);
    }
  }

  std::vector<at::Tensor> run(const std::string& file, std::vector<at::Tensor> inputs) {
    for (at::Tensor& input : inputs) input = input.contiguous();  // packages trust their strides
    if (packages_.count(file)) return packages_[file]->run(inputs);
    const json step = json::parse(read_file(folder_ + "/" + file));
    std::vector<at::Tensor> values = std::move(inputs);
    for (const std::string name : step["constants"]) values.push_back(weights_.at(name));
    for (const json& call : step["calls"]) {
      std::vector<at::Tensor> read;
      for (const size_t index : call["reads"]) read.push_back(values[index].contiguous());
      for (const at::Tensor& made : packages_.at(call["file"])->run(read)) values.push_back(made);
      for (const size_t index : call["frees"]) values[index] = at::Tensor();
    }
    std::vector<at::Tensor> returned;
    for (const size_t index : step["returned"]) returned.push_back(values[index]);
    return returned;
  }

  json manifest;

 private:
  std::string folder_;
  Tensors weights_;
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> packages_;
};

// What a generation keeps between its steps.
class Caches {
 public:
  Caches(const json& manifest, Tensors once) : manifest_(manifest), once_(std::move(once)) {}

  at::Tensor read(const std::string& slot, int step) const {
    const json& factors = manifest_["factors"][step];
    if (factors.contains(slot)) return at::scalar_tensor(factors[slot].get<double>(), at::kFloat);
    return once_.count(slot) ? once_.at(slot) : held_.at(slot);
  }

  // First the slots that take over what others held, all at once; then what the step has written;
  // then what no later step reads is dropped.
  void write(int step, const Tensors& written) {
    Tensors moved;
    std::set<std::string> live;
    for (const json& slot : manifest_["slots"]) {
      const std::string name = slot["name"], source = slot["source"];
      for (const json& life : slot["lives"]) {
        if (life[0] == step && !source.empty()) moved[name] = held_.at(source);
        if (life[0] <= step && life[1] > step) live.insert(name);
      }
    }
    for (const auto& [name, tensor] : moved) held_[name] = tensor;
    for (const auto& [name, tensor] : written) held_[name] = tensor;
    std::erase_if(held_, [&](const auto& entry) { return !live.count(entry.first); });
  }

 private:
  const json& manifest_;
  Tensors once_, held_;
};

using History = std::vector<at::Tensor>;

at::Tensor sum(const std::vector<std::pair<const History*, const json*>>& parts) {
  at::Tensor total;
  for (const auto& [history, terms] : parts)
    for (const json& term : *terms) {
      const size_t ago = term[0];
      const at::Tensor part = (*history)[history->size() - 1 - ago] * term[1].get<double>();
      total = total.defined() ? total + part : part;
    }
  return total;
}

at::Tensor guided(at::Tensor output, const json& stepping, const std::string& layout) {
  const int64_t channels = stepping.value("channels", 0);
  if (channels) output = output.slice(1, 0, channels);  // the others are a learned variance
  if (layout == "none") return output;
  const auto halves = output.chunk(2);
  const bool first = layout == "cond-first";
  const at::Tensor &conditional = halves[first ? 0 : 1], &other = halves[first ? 1 : 0];
  return other + (conditional - other) * stepping["guidance_scale"].get<double>();
}

at::Tensor generate(Bundle& bundle, Tensors inputs) {
  const json& manifest = bundle.manifest;
  const json& stepping = manifest["stepping"];
  if (stepping.is_null()) refuse("the manifest does not say what the sampler does");
  if (!manifest.value("second", json()).is_null()) refuse("guidance in two calls: see docs/bundle-format.md");
  const std::string layout = manifest["sampler"]["cfg_layout"];
  const std::string latent = manifest["latent"], timestep = manifest["timestep"];
  json timestep_spec;
  for (const json& spec : manifest["inputs"])
    if (spec["name"] == timestep) timestep_spec = spec;

  Tensors once;
  if (!manifest["hoisted"].is_null()) {
    const json& hoisted = manifest["hoisted"];
    std::vector<at::Tensor> given;
    for (const std::string name : hoisted["inputs"]) given.push_back(inputs.at(name));
    const auto found = bundle.run(hoisted["file"], given);
    for (size_t i = 0; i < found.size(); ++i) once[hoisted["writes"][i][0]] = found[i];
  }
  Caches caches(manifest, once);
  History latents = {inputs.at("noise") * stepping["noise_scale"].get<double>()}, outputs, clipped;
  for (size_t step = 0; step < manifest["schedule"].size(); ++step) {
    const json& how = stepping["steps"][step];
    const at::Tensor scaled = latents.back() * how["input_scale"].get<double>();
    inputs[latent] = layout == "none" ? scaled : at::cat({scaled, scaled});
    const double time = how["timestep"];
    const std::vector<int64_t> rows(timestep_spec["shape"].size(), inputs[latent].size(0));
    inputs[timestep] = at::full(rows, time, at::dtype(kNames.at(timestep_spec["dtype"])));

    const json& variant = manifest["variants"][manifest["schedule"][step].get<size_t>()];
    std::vector<at::Tensor> given;
    for (const std::string name : variant["inputs"]) given.push_back(inputs.at(name));
    for (const json& read : variant["reads"]) given.push_back(caches.read(read[0], step));
    const auto found = bundle.run(variant["file"], given);
    const size_t results = manifest["outputs"].size();
    Tensors written;
    for (size_t i = results; i < found.size(); ++i)
      written[variant["writes"][i - results][0]] = found[i];
    caches.write(step, written);

    outputs.push_back(guided(found[0], stepping, layout));
    at::Tensor estimate = at::zeros_like(outputs.back());
    const json clip = how.value("clip", json());
    if (!clip.is_null())
      estimate = sum({{&latents, &clip["latents"]}, {&outputs, &clip["outputs"]}})
                     .clamp(clip["low"].get<double>(), clip["high"].get<double>());
    clipped.push_back(estimate);
    latents.push_back(sum({{&latents, &how["latents"]},
                           {&outputs, &how["outputs"]},
                           {&clipped, &how["clipped"]}}));
  }
  return latents.back();
}

}  // namespace

int main(int count, char** given) {
  if (count != 4) {
    std::cerr << "generate BUNDLE INPUTS.safetensors LATENTS.safetensors\n";
    return 2;
  }
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // packages then check sizes, strides and dtypes
  try {
    c10::InferenceMode inference;
    Bundle bundle(given[1]);
    write_latents(given[3], generate(bundle, read_tensors(given[2])));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
