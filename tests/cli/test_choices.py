"""The words that options take are those of the rooms that define them."""

from typing import get_args

import we_surgery as ws
from we_surgery.analysis.removal import CRITERIA, GRANULARITIES
from we_surgery.analysis.scores import SCORES
from we_surgery.cli import choices
from we_surgery.converted.sites import Init, Start
from we_surgery.converted.strip import DEPLOY_FORMS
from we_surgery.planning.policy import DEFAULT_MODE


def test_choices_are_those_of_the_library() -> None:
    assert tuple(ws.MODES) == choices.MODES
    assert choices.DEFAULT_MODE == DEFAULT_MODE
    assert get_args(Init) == choices.INITS
    assert get_args(Start) == choices.STARTS
    assert tuple(DEPLOY_FORMS) == choices.DEPLOY_FORMS
    assert tuple(SCORES) == choices.SCORES
    assert choices.GRANULARITIES == GRANULARITIES
    assert choices.CRITERIA == CRITERIA
