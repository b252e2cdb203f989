"""Compares the engine with Hugging Face transformers at full width, with random weights and few layers.

  hf_parity.py make CONFIG_DIR OUT [--layers N] [--tokens N] [--rank R] [--device cuda|cpu] [--seed S]
      Makes a model of that config.json with N layers (every kind of layer that the config has), a PEFT
      adapter on everything that one may target, and what transformers answers for random tokens: logprobs
      in float32 and in bf16, and the input of every layer's norms in float32.
  hf_parity.py check OUT --run QUIVER_RUN [--backend B] [--extra ARGS]
      Scores the same tokens with the engine and prints, for base and adapter: KL to the float32 reference
      (mean of 0.5 d^2 over token logprobs) beside that of transformers in bf16, the worst logprob, how often
      the most likely token agrees where the reference's margin is above 0.3 (again beside transformers in
      bf16: routers with random weights have many near-ties), and the smallest cosine of a layer's input.

Needs torch, transformers 5.17, peft and safetensors. Mamba-2's time step is not clamped from below, as in the
released models (transformers 5.17 clamps it at time_step_min while it reads a prompt).
"""

import argparse
import json
import math
import os
import subprocess
import sys

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MARGIN = 0.3


# --- make -------------------------------------------------------------------------------------


def small_config(path, layers):
    """The text config with few layers, of which every kind that the model has is one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "text_config", config)
    field = "layer_types" if hasattr(config, "layer_types") and config.model_type != "nemotron_h" else "layers_block_type"
    kinds = list(getattr(config, field))
    order = sorted(set(kinds), key=kinds.index)
    chosen = kinds[:layers]
    for kind in order:
        if kind not in chosen:
            spare = max(range(len(chosen)), key=lambda i: chosen.count(chosen[i]))
            chosen[spare] = kind
    setattr(config, field, chosen)
    config.num_hidden_layers = len(chosen)
    return config


def shake(model, torch):
    """Random weights as a trained model could have them: nothing is zero that the arithmetic depends on."""
    for name, p in model.named_parameters():
        if "norm" in name and p.dim() == 1:
            p.data.add_(torch.randn_like(p) * 0.1)
        elif name.endswith("e_score_correction_bias"):
            p.data.normal_(0, 0.05)
        elif name.endswith("dt_bias"):
            p.data.uniform_(-4, 0)
        elif name.endswith(("conv1d.weight", "conv1d.bias")):
            p.data.normal_(0, 0.3)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.normal_(0, 0.05)


def unclamp(model):
    for m in model.modules():
        if hasattr(m, "time_step_limit"):
            m.time_step_limit = (0.0, math.inf)


def run_model(model, tokens, torch, inputs=None):
    """Logprobs of tokens 1.. and logits; into `inputs` what each norm of the residual stream gives."""
    hooks = []
    if inputs is not None:
        for name, m in model.named_modules():
            last = name.rsplit(".", 1)[-1]
            layer = name.split("layers.")[-1].split(".")[0] if "layers." in name else "model"
            names = {
                "input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm", "norm_f": "final_norm",
                "norm": "mixer_norm" if layer != "model" else "final_norm",
            }  # fmt: skip
            if last in names and name.count(".") <= 5 and ".mixer." not in name and "linear_attn" not in name:
                key = f"{layer}.{names[last]}"
                hooks.append(m.register_forward_hook(lambda _, __, out, key=key: inputs.__setitem__(key, out[0].float().cpu())))
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    logprobs = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None].long())[:, 0]
    return logprobs.cpu(), logits.cpu()


def write_tokenizer(out, vocab):
    """A tokenizer with as many entries as the model: the engine wants one, the tokens here are ids."""
    symbols = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    symbols += [chr(256 + i) for i in range(256 - len(symbols))]
    words = {s: i for i, s in enumerate(symbols)}
    for i in range(len(words), vocab):
        words[f"w{i}"] = i
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": words, "merges": []},
    }  # fmt: skip
    with open(os.path.join(out, "tokenizer.json"), "w") as f:
        json.dump(tokenizer, f)


def make_adapter(model, rank, seed, torch):
    from peft import LoraConfig, get_peft_model
    from peft.tuners import tuners_utils

    # peft refuses Mamba's out_proj because fused kernels would pass it by; the plain path does not.
    tuners_utils._check_lora_target_modules_mamba = lambda *_: None
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"})
    experts = sorted({"experts." + n.rsplit(".", 1)[-1] for n, _ in model.named_parameters() if ".experts." in n})
    torch.manual_seed(seed + 1)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, target_parameters=experts or None,
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    return get_peft_model(model, config)


def make(a):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(a.seed)
    config = small_config(a.config, a.layers)
    with torch.device(a.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shake(model, torch)
    unclamp(model)
    os.makedirs(a.out, exist_ok=True)
    model.save_pretrained(a.out)
    write_tokenizer(a.out, config.vocab_size)
    tokens = torch.randint(0, config.vocab_size, (a.tokens,), device=a.device)
    result = {"tokens": tokens.int().cpu()}

    def reference(name, m):
        result[name + ".bf16"], logits = run_model(m, tokens, torch)
        result[name + ".bf16_top"] = logits.argmax(-1).int()
        inputs = {}
        m.float()
        result[name + ".logprobs"], logits = run_model(m, tokens, torch, inputs)
        top = logits.topk(2, -1)
        result[name + ".top"] = top.indices[:, 0].int()
        result[name + ".margin"] = top.values[:, 0] - top.values[:, 1]
        for key, value in inputs.items():
            result[f"{name}.in.{key}"] = value
        m.to(torch.bfloat16)

    reference("base", model)
    adapted = make_adapter(model, a.rank, a.seed, torch)
    unclamp(adapted)
    adapted.save_pretrained(os.path.join(a.out, "adapter"))
    reference("adapter", adapted)
    save_file({k: v.contiguous() for k, v in result.items()}, os.path.join(a.out, "reference.safetensors"))
    params = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{a.out}: {config.num_hidden_layers} layers, {params:.2f} G parameters, {a.tokens} tokens")


# --- check ------------------------------------------------------------------------------------


def score(a, tokens, name, dump):
    request = dict(type="submit", id=name, tokens=tokens, max_tokens=0, prompt_logprobs=1, stream=False)
    command = [a.run, "--quiet", "--model", a.out, "--backend", a.backend, "--dump", dump,
               "--step-tokens", "4096", "--prefill-chunk", "0", "--max-running", "4", "--adapter-slots", "1",
               "--max-context", "4096", *a.extra.split()]  # fmt: skip
    if name == "adapter":
        command += ["--adapter", f"adapter={a.out}/adapter"]
        request["adapter"] = "adapter"
    done = subprocess.run(command, input=json.dumps(request) + "\n", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} exited {done.returncode}: {done.stderr[-800:]}")
    reply = json.loads(done.stdout.splitlines()[-1])
    if reply["type"] != "done":
        sys.exit(f"{name}: {reply}")
    return reply


def check(a):
    import torch
    from safetensors.torch import load_file

    want = load_file(os.path.join(a.out, "reference.safetensors"))
    tokens = want["tokens"].tolist()
    ok = True
    print(f"{'':8} {'KL':>9} {'KL of HF bf16':>14} {'worst':>7} {'greedy':>9} {'HF greedy':>9} {'cosine':>8}  worst layer")
    for name in ("base", "adapter"):
        dump = os.path.join(a.out, f"{name}.dump.safetensors")
        reply = score(a, tokens, name, dump)
        ref = want[name + ".logprobs"]
        got = torch.tensor(reply["prompt_logprobs"][1:])
        d, hf = got - ref, want[name + ".bf16"] - ref
        kl, kl_hf = float((0.5 * d * d).mean()), float((0.5 * hf * hf).mean())
        tops = [row[0][0] for row in reply["prompt_top_logprobs"][1:]]
        sure = (want[name + ".margin"][:-1] > MARGIN).nonzero()[:, 0].tolist()
        top = want[name + ".top"].tolist()
        agree = sum(tops[i] == top[i] for i in sure)
        agree_hf = sum(int(want[name + ".bf16_top"][i]) == top[i] for i in sure)
        state = load_file(dump)
        worst, where = 1.0, ""
        for key, value in want.items():
            layer = key.removeprefix(f"{name}.in.")
            if layer == key or layer not in state:
                continue
            n = min(len(value), len(state[layer]))
            cosine = float(torch.nn.functional.cosine_similarity(value[:n], state[layer][:n], dim=-1).min())
            if cosine < worst:
                worst, where = cosine, layer
        good = kl <= max(2 * kl_hf, 1e-6) and agree >= agree_hf
        ok = ok and good
        print(f"{name:8} {kl:9.2e} {kl_hf:14.2e} {float(d.abs().max()):7.4f} {agree:4d}/{len(sure):<4d} {agree_hf:9d} {worst:8.5f}  {where} {'' if good else '<- over twice, or greedy agrees less'}")
        os.remove(dump)
    sys.exit(0 if ok else 1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    m = sub.add_parser("make")
    m.add_argument("config")
    m.add_argument("out")
    m.add_argument("--layers", type=int, default=4)
    m.add_argument("--tokens", type=int, default=192)
    m.add_argument("--rank", type=int, default=16)
    m.add_argument("--device", default="cuda")
    m.add_argument("--seed", type=int, default=1)
    c = sub.add_parser("check")
    c.add_argument("out")
    c.add_argument("--run", required=True)
    c.add_argument("--backend", default="cpu")
    c.add_argument("--extra", default="")
    a = p.parse_args()
    make(a) if a.command == "make" else check(a)


if __name__ == "__main__":
    main()
