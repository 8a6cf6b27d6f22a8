"""Loader of configurations: order of the sources, base files, and all errors at once with the nearest name."""

import re

import pytest

from collm_dist.config import Config
from collm_dist.config.foreign_names import FOREIGN_NAMES
from collm_dist.config.loader import (
    apply_overrides,
    change_settings,
    dump_config,
    list_fields,
    load_config,
)
from collm_dist.errors import ConfigError

GOOD = "run: {dir: runs/x}\ndataset: {path: a.csv, columns: {rating: stars}}\n"


@pytest.fixture
def write(tmp_path):
    def write_config(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


def test_overrides_win_over_the_file_and_the_file_over_defaults(write):
    path = write(GOOD + "stage1: {learning_rate: 5e-4, warmup_steps: 7}\n")
    config = load_config(path, ["stage1.warmup_steps=9", "evaluation.splits=[test]", "cf.embedding_dim=8"])
    assert config.stage1.learning_rate == 5e-4
    assert config.stage1.warmup_steps == 9
    assert config.evaluation.splits == ("test",)
    assert config.cf.embedding_dim == 8
    assert config.stage2 == Config.model_validate(config.model_dump()).stage2


def test_a_removed_setting_is_ignored_at_its_default_and_refused_otherwise(write):
    path = write(GOOD + "cluster: {hostfile: null, master_address: null, zero_stage: 1}\n")
    assert load_config(path).cluster.zero_stage == 1
    with pytest.raises(ConfigError, match=r"1 error .*\n  cluster\.hostfile: .* any more: .*cluster\.md"):
        load_config(path, ["cluster.hostfile=hosts.txt"])


def test_plain_yes_no_and_dates_are_strings_and_exponents_numbers(write):
    path = write(
        GOOD + "prompt: {yes: ' Yes', no: ' No', score: yes}\ncluster: {deepspeed_extra: {a: 1e-4, b: 2026-01-01}}\n"
    )
    config = load_config(path)
    assert (config.prompt.yes, config.prompt.no, config.prompt.score) == (" Yes", " No", "yes")
    assert config.cluster.deepspeed_extra == {"a": 1e-4, "b": "2026-01-01"}


def test_merge_keys_and_empty_sections(write):
    config = load_config(
        write(GOOD + "stage1: &s {warmup_steps: 3, max_steps: 5}\nstage2:\n  <<: *s\n  max_steps: 6\ncf:\n")
    )
    assert (config.stage2.warmup_steps, config.stage2.max_steps) == (3, 6)
    assert config.cf.model == "mf"


def test_a_dump_loads_equal(write, tmp_path):
    config = load_config(write(GOOD + "prompt: {stage1: 'Liked: <ItemTitleList>\n\n  x', yes: ' Yes', score: yes}\n"))
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_all_errors_are_reported_at_once(write):
    path = write(
        "output_dir: runs/x\nrun: {dir: 5}\ndataset: {path: a.csv, columns: {rating: r}, formatt: table}\n"
        "stage1: {lerning_rate: 1e-3, learning_rate: -1, per_device_train_batch_size: 4}\n"
        "preprocessing: {ties: ordr}\nzero_optimization: {stage: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=1", "nonsense", "run.dir.x=1", "lora.target_modules=[a", "lora_r=4"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: {len(lines) - 1} errors in the configuration"
    for line in (
        "dataset.formatt: no such setting ('table') - nearest name 'dataset.format'",
        "stage1.lerning_rate: no such setting (0.001) - nearest name 'stage1.learning_rate'",
        "stage1.learning_rate: should be greater than 0 (-1)",
        "preprocessing.ties: should be 'strict' or 'order' ('ordr') - nearest name 'order'",
        "seed: no such setting (1) - nearest name 'run.seed'",
        "nonsense: an override must have the form section.key=value",
        "lora.target_modules: malformed list, mapping or quoted string ([a)",
        "lora_r: no such setting (4) - in collm-dist: lora.rank",
        "output_dir: no such setting ('runs/x') - in collm-dist: run.dir",
    ):
        assert f"  {line}" in lines
    assert any(
        line.startswith("  stage1.per_device_train_batch_size:") and "global_batch_size" in line for line in lines
    )
    assert any(line.startswith("  zero_optimization:") and "cluster.zero_stage" in line for line in lines)


def test_a_setting_of_several_kinds_gives_one_error(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), ["lora.rank=abc", "lora.target_modules=[null]", "run.reuse=[1]"])
    rank = "lora.rank: should be a valid integer, unable to parse string as an integer, or should be 'full' ('abc')"
    assert sorted(str(caught.value).splitlines()[1:]) == [
        f"  {rank}",
        "  lora.target_modules.0: should be a valid string (None)",
        "  lora.target_modules: Tuple should have at least 1 item after validation, not 0, or should be 'all' ([None])",
        "  run.reuse.0: should be a valid string (1)",
    ]
    with pytest.raises(ConfigError, match=f"^{re.escape(rank)}$"):
        change_settings(load_config(write(GOOD)), {"lora.rank": "abc"})


def test_a_check_across_sections_gives_its_message_alone(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), ["anchor.kind=cf", "cf.cross_fit=off"])
    assert len(str(caught.value).splitlines()) == 2
    assert str(caught.value).splitlines()[1].startswith("  anchor.kind cf reads a CF model that has not seen")


def test_missing_and_conflicting_settings(write):
    with pytest.raises(ConfigError, match=r"run: is required"):
        load_config(write("dataset: {path: a}\n"))
    with pytest.raises(ConfigError, match=r"give exactly one of dataset.path and dataset.asset"):
        load_config(write("run: {dir: x}\ndataset: {}\n"))
    with pytest.raises(ConfigError, match=r"prompt.history_length 60 exceeds preprocessing.max_history_length 50"):
        load_config(write(GOOD), ["prompt.history_length=60"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cf.cross_fit=true", r"cf\.cross_fit: should be a number, not true or false"),
        ("cf.cross_fit='1'", r"cf\.cross_fit: should be off or at least 2 folds"),
        ("cf.cross_fit=1", r"cf\.cross_fit: should be off or at least 2 folds"),
        ("stage1.warmup_steps=true", r"stage1\.warmup_steps: should be a number, not true or false"),
        ("stage1.learning_rate=true", r"stage1\.learning_rate: should be a number, not true or false"),
        ("preprocessing.num_shards=true", r"preprocessing\.num_shards: should be a number, not true or false"),
        ("cluster.zero_stage=true", r"cluster\.zero_stage: should be a number, not true or false"),
        ("cf.seeds=[0, true]", r"cf\.seeds: should be a number, not true or false"),
        ("dataset.time_format='%d/%m/%Y %Q'", r"dataset\.time_format: 'Q' is a bad directive .*; use directives"),
        ("dataset.time_format=100%", r"dataset\.time_format: stray %"),
        ("dataset.time_format='%d.%d.%Y'", r"dataset\.time_format: redefinition of group name 'd'.*; use directives"),
    ],
)
def test_true_is_not_1_and_formats_are_tried(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(GOOD), [override])


@pytest.mark.parametrize("override", ["cf.cross_fit=false", "cf.cross_fit=0", "cf.cross_fit=off"])
def test_cross_fit_is_off_in_every_spelling(write, override):
    assert load_config(write(GOOD), [override, "dataset.time_format='%d.%m.%Y %H:%M'"]).cf.cross_fit == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {dir: x\ndataset: 3", r"config\.yaml:2: "),
        ("run: {dir: x}\nrun: {dir: y}", r"config\.yaml:2: duplicate key 'run', first in line 1"),
        ("- a\n- b", r"expected sections"),
    ],
)
def test_bad_yaml_names_file_and_line(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_a_file_changes_settings_of_its_base(write, tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "base.yaml").write_text(
        GOOD + "cf: {embedding_dim: 4, dropout: 0.5}\nevaluation: {splits: [test], cutoffs: [1, 2]}\nlora:\n"
    )
    (tmp_path / "deeper" / "middle.yaml").write_text("base: ../base.yaml\ncf: {embedding_dim: 5, num_epochs: 7}\n")
    path = write("base: deeper/middle.yaml\nrun: {seed: 3}\ncf: {num_epochs: 8}\nevaluation: {cutoffs: [3]}\n")
    config = load_config(path, ["cf.dropout=0.25"])
    assert (config.run.dir, config.run.seed, config.evaluation.splits) == ("runs/x", 3, ("test",))
    assert (config.cf.embedding_dim, config.cf.num_epochs, config.cf.dropout) == (5, 8, 0.25)
    assert config.evaluation.cutoffs == (3,)
    assert not dump_config(config).startswith("base:")


def test_keys_of_a_file_precede_those_of_its_base(write, tmp_path):
    """A search draws settings in the order of its space: a file that names all of them again decides it."""
    (tmp_path / "base.yaml").write_text("cf_search: {space: {dropout: {choice: [0]}, init_scale: {choice: [1]}}}\n")
    space = "{init_scale: {choice: [2]}, num_layers: {choice: [3]}, dropout: {choice: [0.5]}}"
    config = load_config(write(GOOD + f"base: base.yaml\ncf_search: {{space: {space}}}\n"))
    assert list(config.cf_search.space.items()) == [
        ("init_scale", {"choice": (2,)}),
        ("num_layers", {"choice": (3,)}),
        ("dropout", {"choice": (0.5,)}),
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("absent.yaml", r"config\.yaml: base: file '.*absent\.yaml' does not exist"),
        ("[a.yaml]", r"config\.yaml: base: should be the path of a YAML file \(\['a\.yaml'\]\)"),
        ("config.yaml", r"config\.yaml: base: the files lead back to one another: .*config\.yaml -> .*config\.yaml"),
        ("back.yaml", r"back\.yaml: base: the files lead back to one another: .*config\.yaml -> .*back\.yaml -> "),
        ("broken.yaml", r"broken\.yaml:2: "),
    ],
)
def test_a_base_that_cannot_be_read(write, tmp_path, base, message):
    (tmp_path / "back.yaml").write_text("base: ./config.yaml\n")
    (tmp_path / "broken.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=message):
        load_config(write(GOOD + f"base: {base}\n"))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_foreign_names_point_to_settings():
    """Every hint names settings that exist."""
    paths = {name for name, _ in list_fields(Config)}
    last = {path.rsplit(".", 1)[-1] for path in paths}
    for foreign, hint in FOREIGN_NAMES.items():
        ours = [word.strip(",;:()") for word in hint.split() if "." in word]
        assert all(word.rstrip(".") in paths for word in ours), (foreign, hint)
        assert ours or hint.startswith("none") or any(name in hint for name in last), (foreign, hint)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hidden@bucket/x",
        "s3://KEY:hid/den@bucket/x",
        "https://hidden@host/x.csv",
        "HTTPS://hidden@host",
        "s3://bucket/x?secret_key=hidden",
        "gs://b/x?a=1&token=hidden",
        "s3://b/x?session_token=hidden",
        "https://host/x.csv?se=2026&sig=hidden",
        "https://host/x.csv?X-Amz-Date=1&X-Amz-Signature=hidden",
        "https://host/x.csv?AWSAccessKeyId=hidden",
        "https://host/x.csv?api_key=hidden",
        "https://host/x.csv?key=hidden",
    ],
)
@pytest.mark.parametrize("key", ["dataset.path", "dataset.items_path", "dataset.forget", "run.publish_to"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(write, key, uri):
    with pytest.raises(ConfigError, match=f"{key}: credentials in a URI would be written") as caught:
        load_config(write(GOOD), [f"{key}={uri}"])
    assert "hidden" not in str(caught.value).replace("/", "")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/x@y?region=eu-central-1&endpoint_override=host:9000",
        "abfs://container@account.dfs.core.windows.net/x.csv",
        "hdfs://user@host:8020/x@y.csv",
        "http://host:8080/x@y.csv?version=3",
        "http://[::1]:8080/x@y.csv",
        "postgresql://reader@host/catalog",
        "C:/x@y.csv",
    ],
)
def test_addresses_without_a_secret_are_accepted(write, uri):
    assert load_config(write(GOOD), [f"dataset.path={uri}"]).dataset.path == uri


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_language_models_own_loss_needs_an_anchor(write, stage):
    setting = f"{stage}.llm_loss_weight=0.5"
    with pytest.raises(ConfigError, match=rf"{stage}\.llm_loss_weight 0\.5 .*anchor\.kind is none"):
        load_config(write(GOOD), [setting])
    load_config(write(GOOD), [setting, "anchor.kind=as_of"])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_settings_that_need_sampled_dislikes_are_refused_for_ratings(write, stage):
    setting = f"{stage}.listwise_weight=0.5"
    with pytest.raises(ConfigError, match=rf"{stage}\.listwise_weight 0\.5 .*; use pairwise_weight"):
        load_config(write(GOOD), [setting])
    load_config(write(GOOD), [setting, "dataset.feedback=implicit"])
    load_config(write(GOOD), [f"{stage}.pairwise_weight=0.5"])
    setting = f"{stage}.select_metric=ndcg@10"
    with pytest.raises(ConfigError, match=rf"{stage}\.select_metric ndcg@10 .*; choose auc"):
        load_config(write(GOOD), [setting])
    load_config(write(GOOD), [setting, "dataset.feedback=implicit"])


@pytest.mark.parametrize(
    ("baseline", "others", "remedy"),
    [
        ("popularity", [], "dataset.feedback=implicit"),
        ("bias_logistic", ["dataset.feedback=implicit"], "dataset.feedback=explicit"),
        ("as_of_logistic", ["dataset.feedback=implicit"], "dataset.feedback=explicit"),
        ("slots_without_llm", ["evaluation.slots_ablation=false"], "evaluation.slots_ablation=true"),
        ("stage1", ["stage1.enabled=false"], "stage1.enabled=true"),
        ("anchor", [], "anchor.kind=as_of"),
        ("cf", ["cf.model=none", "stage2.train_cf=scratch"], "cf.model=mf"),
    ],
)
def test_a_baseline_that_the_report_lacks_is_refused_with_the_setting(write, baseline, others, remedy):
    settings = [f"promotion.baseline={baseline}", *others]
    with pytest.raises(ConfigError, match=rf"promotion\.baseline {baseline}: .*{remedy.partition('=')[0]}"):
        load_config(write(GOOD), settings)
    load_config(write(GOOD), [*settings, remedy])


@pytest.mark.parametrize(
    "setting",
    [
        "evaluation.cutoffs=[0]", "evaluation.cutoffs=[5, -1]", "evaluation.splits=[]", "cf.hidden_sizes=[0]",
        "cf.attention_sizes=[8, -1]", "lora.target_modules=[]",
    ],
)  # fmt: skip
def test_lists_have_bounds_too(write, setting):
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}.*(greater than or equal|at least 1 item)"):
        load_config(write(GOOD), [setting])


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "mrr@10", "AUC", "hr@10x"])
def test_an_unknown_validation_metric_is_refused_with_the_known_ones(write, name):
    with pytest.raises(ConfigError, match=rf"stage2\.select_metric: '{name}' is not a validation metric: use auc, "):
        load_config(write(GOOD), [f"stage2.select_metric={name}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dataset.item_text={title} by {author}", "{title} by {author}"),
        ("dataset.item_text={title}", "{title}"),
        ('dataset.item_text="{title}: {genres}"', "{title}: {genres}"),
        ("dataset.path=2024", "2024"),
        ("dataset.path=~", None),
        ("llm.revision=0123", "0123"),
    ],
)
def test_a_setting_that_holds_text_takes_it_as_it_is(override, expected):
    document = {}
    assert apply_overrides(document, [override]) == []
    (section,) = document.values()
    (value,) = section.values()
    assert value == expected
