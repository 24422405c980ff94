#!/usr/bin/env python3
"""Writes the texts of `benches/quality.rs` into the current folder: `texts.py wikitext2-valid.txt`.

calib.txt and wiki.txt are the first 70 % and the rest of a WikiText-2 text in its post-processed form, with the
spaces before punctuation undone and <unk> dropped; pydoc.txt is Python's documentation as `help()` shows it
(the results were made with Python 3.11's).
"""

import pydoc_data.topics
import re
import sys


def plain(text):
    text = text.replace(" <unk>", "").replace("<unk>", "")
    for joint in "-,.":
        text = text.replace(f" @{joint}@ ", joint)
    text = re.sub(r" ([.,;:!?)\]%'’])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)


if len(sys.argv) != 2:
    sys.exit(__doc__)
with open(sys.argv[1], encoding="utf-8") as file:
    wiki = plain(file.read())
cut = len(wiki) * 7 // 10
write("calib.txt", wiki[:cut])
write("wiki.txt", wiki[cut:])
topics = pydoc_data.topics.topics
write("pydoc.txt", "\n\n".join(topics[name] for name in sorted(topics)))
