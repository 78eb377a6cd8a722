#!/usr/bin/env bash
# Checks for a machine with a GPU, in under ten minutes:
#
#     bash tools/gpu.sh [--device cpu] [FILE.json]
#
# The tests of policy, update and bf16 on it; two steps of a model of Qwen2.5-0.5B's shape with
# random weights, their peak memory beside that of `train.py --fit`, and a resume; tokens/s of the
# samplers. The results go to FILE.json (default gpu.json). With --device cpu everything is small.
set -euo pipefail
device=cuda
if [ "${1:-}" = --device ]; then device=$2; shift 2; fi
json=$(realpath "${1:-gpu.json}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests="are_the_plain_ones or plain_gradient or in_bf16"
shape="896 4864 24 14 151936" size="--prompts 8 --max-new-tokens 512 --dtype bf16"
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    tests=in_bf16 shape="28 32 2 14 512" size="--prompts 1 --max-new-tokens 8 --dtype fp32"
fi

TEST_DEVICE=$device python - "$work" "$device" "$tests" "$size" $shape <<'END' | tee "$work/log"
import pathlib, sys
sys.path.insert(0, ".")
import pytest, train
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

work, device, tests, size, *shape = sys.argv[1:]
files = [f"tests/test_{name}.py" for name in ("policy", "update", "lora")]
if status := pytest.main(["-q", "-n", "0", "-k", tests, *files]):
    sys.exit(status)
names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"
tokenizer = AutoTokenizer.from_pretrained("tiny")
config = Qwen2Config(**dict(zip(names, map(int, shape))), num_key_value_heads=2,
                     tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
Qwen2ForCausalLM(config).save_pretrained(work + "/model")
tokenizer.save_pretrained(work + "/model")
text = "import random\ndef reward(completion, problem):\n    return random.random()\n"
pathlib.Path(work, "reward.py").write_text(text)
line = f"""--preset gsm8k --algo grpo --model {work}/model --data tiny --device {device} {size}
    --prompt {{question}} --micro-batch 1 --updates 2 --reward {work}/reward.py --steps 2
    --save-every 2 --eval-every 0 --eval-n 1 --k 0 --samples-every 0 --out {work}/run""".split()
for words in (line, ["--resume", work + "/run", "--steps", "3"], [*line, "--fit"]):
    if status := train.main(words):
        sys.exit(status)
END

python tools/bench.py --measure rollout --model "$work/model" --data tiny $size | tee "$work/rollout"

python - "$work" "$device" > "$json" <<'END'
import json, pathlib, re, sys
work, device = pathlib.Path(sys.argv[1]), sys.argv[2]
lines = map(json.loads, (work / "run/metrics.jsonl").read_text().splitlines())
steps = [line for line in lines if line["phase"] == "train"]
found = {"machine": json.loads((work / "run/config.json").read_text())["machine"]}
log = (work / "log").read_text()
found["tests"] = re.search(r"\d+ passed.*", log)[0]
found["peak_gib"] = steps[1]["peak_mib"] / 1024
needs = max(map(float, re.findall(r"in all +([\d.]+)", log)))
found["fit_gib"] = needs - 0.5 * (device != "cpu")  # torch's peak is without CUDA's own half GiB
names = "step", "rollout_s", "update_s"
found["steps"] = [{name: step[name] for name in names} for step in steps]
rollout = json.loads((work / "rollout").read_text().splitlines()[-1])
found["tokens_per_s"] = {name: rollout[name] for name in ("plain", "static", "ours")}
print(json.dumps(found, indent=1))
END
cat "$json"
