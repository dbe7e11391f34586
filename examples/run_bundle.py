"""Generate by numpy and onnxruntime alone, from a bundle's golden noise: BUNDLE OUT.npy."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

KINDS = {"F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
m = json.loads(((root := Path(sys.argv[1])) / "manifest.json").read_text())
data = (root / m["golden"]).read_bytes()
size, golden = 8 + int.from_bytes(data[:8], "little"), {}
for name, entry in json.loads(data[8:size]).items():
    if name != "__metadata__":
        part = data[size:][slice(*entry["data_offsets"])]
        golden[name] = np.frombuffer(part, KINDS[entry["dtype"]]).reshape(entry["shape"])
conditions = {name[7:]: item for name, item in golden.items() if name.startswith("inputs/")}
inputs, layout = {spec["name"]: spec for spec in m["inputs"]}, m["sampler"]["cfg_layout"]
timestep, latent = inputs[m["timestep"]], inputs[m["latent"]]
assert not any([m.get("second"), m["sampler"].get("phases")]), "see docs/bundle-format.md"
graphs = filter(None, [*m["variants"], m["hoisted"]])
sessions = {g["file"]: ort.InferenceSession(root / g["file"]) for g in graphs}


def run(graph, given, held, results=()):
    """Return what the model returns, and what the graph writes, by slot."""
    feeds = {n: given[n] for n in graph["inputs"]} | {n: held[slot] for slot, n in graph["reads"]}
    names = [spec["name"] for spec in results] + [name for _, name in graph["writes"]]
    found = sessions[graph["file"]].run(names, feeds)
    return found, dict(zip([s for s, _ in graph["writes"]], found[len(results) :], strict=True))


def total(terms):
    """Return the sum of what each sequence held some steps ago, times a factor."""
    return sum(f * seen[name][-1 - ago] for name in seen for ago, f in terms.get(name, ()))


once, slots = run(m["hoisted"], conditions, {})[1] if m["hoisted"] else {}, {}
seen = {"latents": [golden["noise"] * m["stepping"]["noise_scale"]], "outputs": [], "clipped": []}
for step, how in enumerate(m["stepping"]["steps"]):
    rows = np.concatenate([seen["latents"][-1] * how["input_scale"]] * (1 + (layout != "none")))
    at = np.full(timestep["shape"] and [len(rows)], how["timestep"], timestep["dtype"])
    given = conditions | {timestep["name"]: at, latent["name"]: rows.astype(latent["dtype"])}
    held = once | slots | {slot: np.array(f, "f4") for slot, f in m["factors"][step].items()}
    (output, *_), written = run(m["variants"][m["schedule"][step]], given, held, m["outputs"])
    lives = [(slot, *life) for slot in m["slots"] for life in slot["lives"]]
    moves = {s["name"]: slots[s["source"]] for s, at, _ in lives if s["source"] and at == step}
    slots = slots | moves | written
    slots = {s["name"]: slots[s["name"]] for s, began, last in lives if began <= step < last}
    output = output[:, : m["stepping"]["channels"] or None].astype("f4")
    if layout != "none":
        cond, other = np.split(output, 2)[:: 1 if layout == "cond-first" else -1]
        output = other + m["stepping"]["guidance_scale"] * (cond - other)
    seen["outputs"].append(output)
    clip = how["clip"] or {"low": 0, "high": 0}
    seen["clipped"].append(np.clip(total(clip), clip["low"], clip["high"]))
    seen["latents"].append(total(how))
np.save(sys.argv[2], seen["latents"][-1])
