"""NeMo-Gym's configuration of a server, as options of ours: taken over, told to be left, or refused."""

from __future__ import annotations

import pytest
import yaml
from support.pages import ROOT

from rmcore._base.errors import InputError
from rmcore.cli import nemo_gym
from rmcore.cli.nemo_gym import serve_arguments

NAME = "genrm_compare_resources_server"
GIVEN = {"rm": "my-rm", "genrm_base_url": "http://genrm/v1", "genrm_model_name": "big"}


def config(**own):
    found = yaml.safe_load((ROOT / "examples" / "nemo_gym" / "genrm.yaml").read_text()) | GIVEN
    found[NAME]["resources_servers"]["rmcore_genrm"] |= {"host": "127.0.0.1", "port": 8401} | own
    return found


def test_the_example_says_what_is_served():
    arguments, left = serve_arguments(config(), NAME)
    assert left == []
    assert arguments[:3] == ["serve", "my-rm", "--nemo-gym"]
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    assert options["--group-size"] == "4"
    assert options["--design"] == "circular"
    assert options["--judge-url"] == "http://genrm/v1"
    assert (options["--judge-kind"], options["--judge-model"], options["--judge-key-env"]) == ("genrm", "big", "")
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8401")


def test_its_own_keys_are_taken_over_or_told():
    own = {
        "comparison_strategy": "all_pairs",
        "use_principle": True,
        "default_principle": "Be kind.",
        "answer_bonus": 0.2,
    }
    own |= {"cohort_collection_timeout_s": 60, "default_score": 3.0, "genrm_parse_retries": 3, "num_workers": 1}
    own |= {
        "options": {"deterministic": True, "trust_remote_code": False, "store": "v.db", "end_token": ["<a>", "<b>"]}
    }
    arguments, left = serve_arguments(config(**own), NAME)
    assert left == ["default_score", "genrm_parse_retries"]
    text = " ".join(arguments)
    for part in ("--design all", "--judge-principle Be kind.", "--nemo-gym-bonus answer_bonus=0.2", "--time-limit 60"):
        assert part in text
    assert text.endswith("--deterministic --store v.db --end-token <a> --end-token <b>")


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"model": "${nothing.here}"}, "nothing.here"),
        ({"model": None}, "model"),
        ({"comparison_strategy": "swiss"}, "comparison_strategy"),
        ({"num_workers": 4}, "num_workers"),
        ({"use_principle": True}, "default_principle"),
        ({"options": ["judge-url"]}, "options"),
    ],
)
def test_what_cannot_be_is_refused_by_name(own, says):
    with pytest.raises(InputError, match=says):
        serve_arguments(config(**own), NAME)


def test_without_nemo_gyms_environment_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("NEMO_GYM_CONFIG_DICT", raising=False)
    with pytest.raises(SystemExit) as ended:
        nemo_gym.main()
    assert ended.value.code == 2
    assert "gym env start" in capsys.readouterr().err


def test_it_serves_what_it_was_told(monkeypatch, capsys):
    served = []
    monkeypatch.setenv("NEMO_GYM_CONFIG_DICT", yaml.safe_dump(config(default_score=3.0)))
    monkeypatch.setenv("NEMO_GYM_CONFIG_PATH", NAME)
    monkeypatch.setattr("rmcore.cli.main", lambda: served.append(list(nemo_gym.sys.argv)))
    nemo_gym.main()
    assert served[0][:3] == ["rmcore", "serve", "my-rm"]
    assert "default_score" in capsys.readouterr().err
