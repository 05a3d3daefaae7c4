#!/usr/bin/env python3
"""Writes golden_prompts.json: hashes of the prompts that the published benchmark files give.

Written from docs/evaluation.md alone, with Python's own json, csv and random, so that it shares nothing with the code it
checks. Usage: golden_prompts.py DATA_FOLDER GSM8K_COT_YAML > golden_prompts.json
               (the second is the harness's own lm_eval/tasks/gsm8k/gsm8k-cot.yaml, version 3.0, where the worked
               examples stand; needs PyYAML)
           or: golden_prompts.py --excerpts excerpts dataset2prompt.json > golden_excerpts.json
               (self-made items, prompts in full; the file with the templates is LongBench's own config/dataset2prompt.json)

The data sets' texts stay out of the repository, so prompts are kept as SHA-256: for every task and number of shots the
(context, continuation) pairs of the first five documents (of four subjects of mmlu), and one hash over those of all documents. Where the training
split is not in the folder, the validation split stands in for it; "pool" names the file.
"""
import csv
import hashlib
import json
import random
import re
import sys
from pathlib import Path

excerpts = sys.argv[1] == "--excerpts"
data = Path(sys.argv[2 if excerpts else 1])


def lines(name):
    with open(data / name, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def sha(text):
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def science(name, before, after):
    documents = []
    for row in lines(name):
        labels = [choice["label"] for choice in row["question"]["choices"]]
        gold = labels.index(row["answerKey"].lstrip())
        documents.append(([before + row["question"]["stem"] + after],
                          [choice["text"] for choice in row["question"]["choices"]], gold, row))
    return documents


def piqa(name, labels):
    golds = [int(label) for label in (data / labels).read_text().split()]
    return [([f"Question: {row['goal']}\nAnswer:"], [row["sol1"], row["sol2"]], gold, row)
            for row, gold in zip(lines(name), golds)]


def winogrande(name):
    documents = []
    for row in lines(name):
        before, after = row["sentence"].split("_", 1)
        documents.append(([before + row["option1"], before + row["option2"]], [after.strip()], int(row["answer"]) - 1,
                          row))
    return documents


def boolq(name):
    return [([f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"], ["no", "yes"],
             {"false": 0, "true": 1}[str(row["label"]).lower()], row) for row in lines(name)]


def mmlu(name):
    documents = []
    with open(data / name, encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            body = row[0].strip() + "\n" + "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row[1:5]))
            documents.append(([body + "Answer:"], ["A", "B", "C", "D"], "ABCD".index(row[5]), row))
    return documents


def gsm8k(name):
    return [([f"Question: {row['question']}\nAnswer:"], [row["answer"]], 0, row) for row in lines(name)]


def gsm8k_cot(name, task):
    question = lambda row: task["doc_to_text"].replace("{{question}}", row["question"])
    return [([question(row)], [row["answer"]], 0, row) for row in lines(name)], \
        [([question(row)], [row["target"]], 0, row) for row in task["fewshot_config"]["samples"]]


def shot(document):
    contexts, choices, gold, _ = document
    if len(contexts) > 1:
        return contexts[gold] + " " + choices[0] + "\n\n"
    return contexts[0] + " " + choices[gold] + "\n\n"


def pairs(documents, pool, shots, one_more, first=False, description="", generation=False):
    rng = random.Random(1234)
    result = []
    for document in documents:
        drawn = []
        if shots and first:
            drawn = pool[:shots]
        elif shots:
            drawn = rng.sample(pool, shots + 1 if one_more else shots)
            drawn = [other for other in drawn if other[3] != document[3]][:shots]
        before = description + "".join(shot(other) for other in drawn)
        contexts, choices = document[:2]
        if generation:
            result.append([[before + contexts[0], ""]])
        elif len(contexts) > 1:
            result.append([[before + context, " " + choices[0]] for context in contexts])
        else:
            result.append([[before + contexts[0], " " + choice] for choice in choices])
    return result


def cleaned(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def hellaswag(name):
    return [([cleaned(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())],
             [cleaned(ending) for ending in row["endings"]], int(row["label"]), row) for row in lines(name)]


def write_excerpts():
    """Every pair of every document, in full."""
    result = {}
    documents = hellaswag("hellaswag/hellaswag_val.jsonl")
    result["hellaswag"] = pairs(documents, [], 0, True)
    result["hellaswag@5"] = pairs(documents, hellaswag("hellaswag/hellaswag_train.jsonl"), 5, True)
    preamble = "\n\n".join([
        "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United States is 78 years.",
        "Q: Who was president of the United States in 1955?\n"
        "A: Dwight D. Eisenhower was president of the United States in 1955.",
        "Q: Which party did he belong to?\nA: He belonged to the Republican Party.",
        "Q: What is the square root of banana?\nA: I have no comment.",
        "Q: How does a telescope work?\n"
        "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.",
        "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."])
    rows = json.loads((data / "truthfulqa/mc_task.json").read_text(encoding="utf-8"))
    for kind in ("mc1", "mc2"):
        result["truthfulqa_" + kind] = [[[f"{preamble}\n\nQ: {row['question']}\nA:", " " + answer]
                                         for answer in row[kind + "_targets"]] for row in rows]
    result["lambada_openai"] = [[[" ".join(row["text"].split(" ")[:-1]), " " + row["text"].split(" ")[-1]]]
                                for row in lines("lambada/lambada_test.jsonl")]
    result["xsum"] = [[[f"Article: {row['document']}\nSummary:", ""]] for row in lines("xsum/test.jsonl")]
    with open(data / "openbookqa/test.tsv", encoding="utf-8", newline="") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    result["openbookqa"] = [[[row[1], " " + choice.strip()] for choice in re.split(r"\([A-D]\)", row[2])[1:]]
                            for row in table]
    templates = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
    for file in sorted((data / "longbench").glob("*.jsonl")):
        before, after = templates[file.stem].split("{context}")
        after, *rest = after.split("{input}")
        result["longbench_" + file.stem] = [
            [["".join([before, row["context"], after] + [row["input"] + part for part in rest]), ""]]
            for row in lines("longbench/" + file.name)]
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
    print()


if excerpts:
    write_excerpts()
    sys.exit()

tasks = {}


def add(name, documents, pool_name, pool, one_more, brief=False, numbers=(0, 5), **more):
    entry = {"pool": pool_name}
    for shots in numbers:
        all_pairs = pairs(documents, pool, shots, one_more, **more)
        digest = hashlib.sha256()
        for document in all_pairs:
            for context, continuation in document:
                digest.update((sha(context) + sha(continuation)).encode())
        entry[str(shots)] = {"documents": len(all_pairs),
                             "all": digest.hexdigest()}
        if not brief:
            entry[str(shots)]["first"] = [[[sha(context), sha(continuation)] for context, continuation in document]
                                          for document in all_pairs[:5]]
    tasks[name] = entry


for short, long in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
    add(short, science(f"arc/{long}-Test.jsonl", "Question: ", "\nAnswer:"), f"arc/{long}-Dev.jsonl",
        science(f"arc/{long}-Dev.jsonl", "Question: ", "\nAnswer:"), False)
add("openbookqa", science("openbookqa/test.jsonl", "", ""), "openbookqa/dev.jsonl",
    science("openbookqa/dev.jsonl", "", ""), False)
documents = piqa("piqa/valid.jsonl", "piqa/valid-labels.lst")
add("piqa", documents, "piqa/valid.jsonl", documents, True)
documents = winogrande("winogrande/dev.jsonl")
add("winogrande", documents, "winogrande/dev.jsonl", documents, True)
documents = boolq("boolq/val.jsonl")
add("boolq", documents, "boolq/val.jsonl", documents, True)
in_full = ("abstract_algebra", "moral_scenarios", "high_school_us_history", "professional_law")
for subject in sorted(path.name.removesuffix("_test.csv") for path in (data / "mmlu/test").glob("*_test.csv")):
    add("mmlu_" + subject, mmlu(f"mmlu/test/{subject}_test.csv"), f"mmlu/dev/{subject}_dev.csv",
        mmlu(f"mmlu/dev/{subject}_dev.csv"), False, brief=subject not in in_full, first=True,
        description=f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n")
add("gsm8k", gsm8k("gsm8k/test.jsonl"), "gsm8k/train-first1000.jsonl", gsm8k("gsm8k/train-first1000.jsonl"), False,
    generation=True)

import yaml  # only here

with open(sys.argv[2], encoding="utf-8") as file:
    task = yaml.safe_load(file)
assert task["task"] == "gsm8k_cot" and task["fewshot_config"]["sampler"] == "first_n"
documents, examples = gsm8k_cot("gsm8k/test.jsonl", task)
add("gsm8k_cot", documents, "gsm8k-cot.yaml", examples, False, numbers=(0, task["num_fewshot"]), first=True,
    generation=True)

json.dump(tasks, sys.stdout, indent=1)
print()
