#!/usr/bin/env python3
"""tests/gpu/scale on a small shape and the CPU: every stage has its row, a second run repeats none of them, nonsense is refused."""
import json, os, subprocess, sys, tempfile

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 256,
         "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
STAGES = ["synthesize", "calibrate", "convert-half", "convert-quarter", "finetune", "evaluate-half", "evaluate-quarter"]


def main():
    program, build = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="headfold-scale-test-") as folder:
        with open(os.path.join(folder, "shape.json"), "w") as file:
            json.dump(SHAPE, file)

        def run(*more):
            line = [sys.executable, program, "--shape", os.path.join(folder, "shape.json"), "--build", build, "--device", "cpu:tensors", "--threads", "1",
                    "--work", os.path.join(folder, "work"), "--samples", "4", "--seq-len", "64", "--steps", "2", "--batch", "2", "--windows", "2",
                    "--out", os.path.join(folder, "scale.json"), *more]
            return subprocess.run(line, capture_output=True, text=True)

        first = run()
        assert first.returncode == 0, first.stdout + first.stderr
        with open(os.path.join(folder, "scale.json")) as file:
            found = json.load(file)
        assert [row["stage"] for row in found["stages"]] == STAGES, found["stages"]
        assert found["product"]["flop_per_second"] > 1e8, found["product"]
        for row in found["stages"]:
            assert row["seconds"] > 0 and row["host_bytes"] > 1 << 20 and row["share"] >= 0, row
            assert row["stage"] in first.stdout
        operations = {row["stage"]: row["operations"] for row in found["stages"]}
        assert operations["calibrate"] > 0 and operations["evaluate-half"] > operations["evaluate-quarter"] > 0, operations
        assert {row["bound"] for row in found["stages"]} == {"products", "storage"}, found["stages"]
        second = run()
        assert second.returncode == 0 and "$ " not in second.stdout, second.stdout + second.stderr
        for wrong in (["--samples", "0"], ["--steps", "x"], ["--build", folder], ["--shape", "no-such-shape", "--work", os.path.join(folder, "other")]):
            refused = run(*wrong)
            assert refused.returncode != 0, (wrong, refused.stdout)
            assert refused.stderr or "not" in refused.stdout, (wrong, refused.stdout)
    print("every stage has its row; a second run repeats none")


if __name__ == "__main__":
    main()
