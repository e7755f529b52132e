"""The shipped texts: what they hold, and that nothing of the evaluation was calibrated on."""

import hashlib
import re

from gossamer import texts


def _runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_evaluation_is_the_start_of_wikitext_2():
    text = texts.evaluation()
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "fd2dab58ac9daf271d1497988053a6a302a8d2008aba6d2d294e8e83c5cbe976"


def test_calibration_is_many_long_documents():
    documents = texts.calibration()
    assert len(documents) == 144
    assert min(map(len, documents)) > 3000
    assert not any("endoftext" in d or d != d.strip() for d in documents)


def test_calibration_shares_no_run_of_eight_words_with_the_evaluation():
    evaluation = _runs(texts.evaluation())
    assert not any(_runs(d) & evaluation for d in texts.calibration())


def test_join_wikitext_puts_a_blank_line_between_rows():
    assert texts.join_wikitext(" \n = A = \n \n b \n") == "\n\n = A = \n\n\n\n\n b \n"
