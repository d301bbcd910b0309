"""Numbers in answers."""

from __future__ import annotations

import math
import re
import unicodedata

DASHES = dict.fromkeys(map(ord, "‐‒–−"), "-")  # for str.translate: hyphen, figure dash, en dash, minus sign
POWER = r"10\s*(?:\^|\*\*)\s*([+-]?\d+)"
TIMES_POWER_OF_TEN = re.compile(rf"(?<=\d)\s*[x×*·⋅]\s*{POWER}")
POWER_OF_TEN = re.compile(rf"(?<![\d.,]){POWER}")
SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# Digits with points and commas between them, a sign before and an exponent behind. Not within a name such as T2 or HER2
# (Latin, Greek, Cyrillic), and not the rest of such a run.
RUN = re.compile(
    r"(?<![A-Za-z\u00c0-\u052f_\d])(?<!\d[.,])(?P<sign>[+-]?)(?P<digits>[.,]?\d(?:\d|[.,](?=\d))*)"
    r"(?:[eE](?P<exponent>[+-]?\d+))?"
)
PLAIN = re.compile(r"\d+|\d*\.\d+")  # 12, 3.5, .5
GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?")  # 1,234 and 1,234,567.8
GROUPED_BY_POINTS = re.compile(r"[1-9]\d{0,2}((\.\d{3}){2,}(,\d+)?|\.\d{3},\d+)")  # 1.234.567 and 1.234,5
DECIMAL_COMMA = re.compile(r"\d*,\d+")  # 3,5 and 0,125


def parse_number(text: str) -> float:
    """The first number in a text; NaN if there is none.

    A unit may follow it: "about 3.5 cm" is 3.5, "5 %" is 5. The sign counts unless a letter or digit precedes it: "-3"
    is -3, "2-3" is 2, "COVID-19" is 19. Digits that follow a letter belong to a name: "T2 lesion of 8 mm" is 8.
    Exponents: "1e-3", "1.5 x 10^9", "1.5 × 10⁹".

    A point is the decimal sign: "1.234" is 1.234. A comma is one as well ("3,5" is 3.5, "0,125" is 0.125), except
    before groups of exactly three digits, which it separates as in English: "1,234" is 1234. Points are separators
    where they cannot be decimal signs: "1.234.567", "1.234,5". Other runs ("1.2.3", "12.05.2020") are no numbers. A
    space ends a number: "1 234" is 1.
    """
    text = SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(DASHES)
    text = POWER_OF_TEN.sub(r"1e\1", TIMES_POWER_OF_TEN.sub(r"e\1", text))
    for run in RUN.finditer(text):
        digits = run["digits"]
        if GROUPED.fullmatch(digits):
            digits = digits.replace(",", "")
        elif GROUPED_BY_POINTS.fullmatch(digits):
            digits = digits.replace(".", "").replace(",", ".")
        elif DECIMAL_COMMA.fullmatch(digits):
            digits = digits.replace(",", ".")
        elif not PLAIN.fullmatch(digits):
            continue
        value = float(f"{run['sign']}{digits}e{run['exponent'] or 0}")
        return value if math.isfinite(value) else math.nan
    return math.nan
