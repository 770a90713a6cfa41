"""Texts that tokenizers disagree about: the same 500 for every run, made of our own words by a fixed seed."""

import random
from collections.abc import Sequence

SEED, NUM_TEXTS = 20261125, 500
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u2028",
    "\u0085",
    "\u200b",
)
WORDS = (
    "spider", "Gossamer", "THREAD", "weaves", "naïve", "Straße", "façade", "cafe\u0301", "don't",
    "We'LL", "it's",
    "I'M", "they’re", "'s", "'S", "o'clock", "x'ſ", "co-operate", "e.g.", "e-mail@example.com", "snake_case",
    "camelCase", "HTTPServer", "ﬁne", "İstanbul", "ΑΒΓδε", "Привет", "мир", "שלום", "مرحبا",
    "नमस्ते", "ありがとう",
    "漢字かな交じり文", "안녕하세요", "Ångström", "Ὀδυσσεύς",
)  # fmt: skip
THAI = (
    "ใยแมงมุม",
    "บางเบา",
    "สวัสดีครับ",
    "ฉันอ่านหนังสือ",
    "ประเทศไทย",
    "๑๒๓",
    "น้ำแข็ง",
    "ก็",
    "ที่",
    "กรุงเทพฯ",
    "เร็วๆ",
)
DIGITS = (
    "0", "7", "42", "007", "1234567890", "3.14159", "1,000,000", "2026-11-25", "23:59:59",
    "0xDEADBEEF", "1e-05",
    "½", "x²", "٣٤٥", "Ⅷ", "#100", "100%", "$19.99", "v1.2.3-rc4", "12ab34", "9" * 25, "①②③", "²³¹",
)  # fmt: skip
EMOJI = ("😀", "🕷️", "🕸", "👩‍👩‍👧‍👦", "👍🏽", "🇹🇭", "❤️", "🏳️‍🌈", "1️⃣", "✨✨", "☃", "🤷🏿‍♀️")
CODE = (
    "def weave(threads: int = 3) -> list[str]:\n    return [f\"{i:02d}\" for i in range(threads)]\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i];  // dot\n\t}\n",
    "SELECT name, COUNT(*) FROM webs WHERE silk >= 0.5 GROUP BY name;",
    "<div class=\"web\"><a href='/?q=%20&amp;x=1'>link</a></div>",
    "if x!=y&&!(z||w): pass  # ~~~ ^^^ ===>",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"\\n\"}}",
    ">>> sorted(\"bca\")\n['a', 'b', 'c']\n\n\n>>> ",
    "\\frac{a^2+b^2}{\\sqrt{2\\pi}} \\alpha_{ij}",
    "git commit -m 'x' && ./run.sh --flag=\"$HOME/a b\" | grep -E '^[^#]+$'",
    "        \t deeply   indented\n      \n\n   text   ",
)  # fmt: skip
CONTROL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>\n",
    "<|im_start|>assistant\n",
    "<repo_name>", "<file_sep>", "<|im_", "start|>", "<|IM_START|>", "<s>", "</s>", "<unk>",
    "[INST]", "<0x0A>",
)  # fmt: skip
SIGNS = "!?.,;:…—–-_*/\\|&^%$#@~`+=<>(){}[]\"'«»“”‘’€£¥©®°·•‰№→∑√∞≈≠"
KINDS: tuple[Sequence[str], ...] = (WORDS, THAI, DIGITS, EMOJI, CODE, CONTROL, SPACES, SIGNS)


def texts() -> list[str]:
    """A fifth of the texts is of one kind each, the others mix kinds, with and without spaces between."""
    rng = random.Random(SEED)
    return [_text(rng, index) for index in range(NUM_TEXTS)]


def _text(rng: random.Random, index: int) -> str:
    kinds = (KINDS[index % len(KINDS)],) if index % 5 == 0 else KINDS
    parts = []
    for _ in range(1 + int(rng.random() * 12)):
        parts.append(_pick(rng, _pick(rng, kinds)))
        if rng.random() < 0.6:
            parts.append(" " if rng.random() < 0.7 else _pick(rng, SPACES))
    return "".join(parts)


def _pick(rng: random.Random, choices: Sequence) -> str:
    return choices[int(rng.random() * len(choices))]
