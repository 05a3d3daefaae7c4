#!/usr/bin/env python3
"""Makes the demo's benchmark tasks from text that its models have never seen (../text/heldout.jsonl).

usage: make_tasks.py [--out FOLDER]

Writes glosses.jsonl (ARC's form) and endings.jsonl (HellaSwag's). Everything is chosen by hashes of the texts themselves: the same input gives the same bytes with any Python
from 3.8 on, and nothing is drawn at random. demo/README.md says what each task asks.
"""

import argparse
import hashlib
import json
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent

GLOSSES = 400
ENDINGS = 400

# A document of dictionary entries has one on every line; prose has at most a stray line of this form.
ENTRY = re.compile(r'^([^:;"]{2,60}): (.+)$')
LINE_BREAK = " \n "
# First words of a gloss that give its part of speech away. Wrong answers are of the right answer's kind.
NOUN = {"a", "an", "the", "any", "one", "some", "large", "small", "genus", "type", "tree"}
ADVERB = {"in", "with", "to"}
ADJECTIVE = {"of", "relating", "having", "not", "being", "characterized", "capable", "used", "lacking", "made", "full"}


def order(salt, text):
    """A key that shuffles."""
    return hashlib.sha256((salt + "\0" + text).encode()).hexdigest()


def pick(candidates, count, salt):
    return sorted(candidates, key=lambda text: order(salt, text))[:count]


def place(right, wrong, salt):
    """The choices in the order they are shown, and the place of the right one."""
    choices = sorted([right] + wrong, key=lambda text: order(salt + " place", text))
    return choices, choices.index(right)


def nearest(candidates, text, length, count):
    """Those whose length is closest to the text's, so that length says nothing."""
    return sorted(candidates, key=lambda other: (abs(length(other) - length(text)), order(text, other)))[:count]


# Dictionary ----------------------------------------------------------------------------------------------------------


def kind(gloss):
    first = re.sub(r"^\([^)]*\) ", "", gloss).split()[0].lower()
    return "n" if first in NOUN else "r" if first in ADVERB else "a" if first in ADJECTIVE else "v"


def read(path):
    """Dictionary entries (words, gloss without examples, number of document), and prose documents (number, text)."""
    entries, prose = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        text = json.loads(line)["text"]
        lines = [part.strip() for part in text.split(LINE_BREAK)]
        matches = [match for match in map(ENTRY.match, lines) if match]
        if len(matches) >= 6 and len(matches) >= 0.8 * len(lines):
            for match in matches:
                gloss = match.group(2).split('; "')[0].rstrip(".") + "."
                if 20 <= len(gloss) <= 110:
                    entries.append((match.group(1), gloss, number))
        else:
            prose.append((number, text))
    # Words with two entries would make a wrong answer right.
    seen = {}
    for words, gloss, number in entries:
        for word in words.split(", "):
            seen[word] = seen.get(word, 0) + 1
    alone = [e for e in entries if all(seen[word] == 1 for word in e[0].split(", "))]
    return alone, prose


def glosses(entries):
    """Which gloss belongs to the words? The wrong ones are glosses of other documents' entries."""
    gloss_of = {words: gloss for words, gloss, _ in entries}
    document = {words: number for words, _, number in entries}
    items = []
    for words in pick(gloss_of, GLOSSES, "glosses"):
        others = [w for w in gloss_of if document[w] != document[words] and kind(gloss_of[w]) == kind(gloss_of[words])]
        others = nearest(others, words, lambda w: len(gloss_of[w]), 24)
        wrong = [gloss_of[w] for w in pick(others, 3, "glosses " + words)]
        choices, right = place(gloss_of[words], wrong, words)
        items.append({
            "id": "glosses_%03d" % len(items),
            "question": {
                "stem": words,
                "choices": [{"text": text, "label": "ABCD"[i]} for i, text in enumerate(choices)],
            },
            "answerKey": "ABCD"[right],
        })
    return items


# Prose ---------------------------------------------------------------------------------------------------------------


def source(text):
    """Whose prose: only Austen's chapters have paragraphs in these files, or honorifics."""
    return "austen" if LINE_BREAK in text or re.search(r"\b(Mr|Mrs|Miss|Sir)\b", text) else "kjv"


def passages(prose, least, most, apart):
    """(source, document, place, words) of passages that begin with a sentence and end with one."""
    found = []
    for number, text in prose:
        pieces = text.replace(LINE_BREAK, " ").split()
        starts = [0] + [i + 1 for i, word in enumerate(pieces[:-1]) if re.search(r"[a-z]{3,}[.!?]$", word)]
        last = -apart
        for end, word in enumerate(pieces):
            if not re.fullmatch(r"[a-z]{4,}[.!?]", word) or end - last < apart:
                continue
            fitting = [start for start in starts if least <= end + 1 - start <= most]
            if fitting:
                found.append((source(text), number, end, pieces[fitting[-1]:end + 1]))
                last = end
    return found


def endings(prose):
    """How does the sentence go on? The wrong endings close sentences of other chapters of the same book or author."""
    tail = 6
    usable = {}
    for one in passages(prose, 36, 64, 20):
        # The ending lies inside its last sentence.
        if not any(re.search(r"[.!?]", word) for word in one[3][-tail - 1:-1]):
            usable[" ".join(one[3][-tail:])] = one
    items = []
    for right in pick(usable, ENDINGS, "endings"):
        book, number, end, pieces = usable[right]
        others = [text for text, one in usable.items() if one[0] == book and one[1] != number]
        wrong = pick(nearest(others, right, len, 24), 3, "endings " + right)
        choices, label = place(right, wrong, right)
        context = " ".join(pieces[:-tail])
        items.append({
            "ind": len(items),
            "activity_label": "Austen" if book == "austen" else "King James Bible",
            "ctx_a": context,
            "ctx_b": "",
            "ctx": context,
            "endings": choices,
            "label": label,
            "split": "val",
            "split_type": "indomain",
            "source_id": "heldout~%d~%d" % (number, end),
        })
    return items


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    out = parser.parse_args().out
    entries, prose = read(HERE.parent / "text" / "heldout.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    for name, items in (("glosses", glosses(entries)), ("endings", endings(prose))):
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (out / (name + ".jsonl")).write_text(text, encoding="utf-8")
        print("%s.jsonl: %d items, %d bytes" % (name, len(items), len(text.encode())))


if __name__ == "__main__":
    main()
