"""Names, URLs and paths become local files."""

from pathlib import Path

import pytest
from di_refine_http import CONTENT

from di_refine.errors import InputError
from di_refine.files import registry


def test_the_registry_is_consistent():
    assert len(registry.registry()) >= 11
    for name, record in registry.registry().items():
        assert ("file" in record) != ("url" in record) and record["kind"] in registry.KINDS
        assert record.get("file", name) == name and record.get("url", "https://").startswith("https://")
        assert record["licence"] and record["note"] and record["resolution"] > 0 and record["channels"] in (1, 3)
        roles = {"teacher": ("edm",), "detector": ("features", "inception"), "statistics": ("statistics",)}
        for role, kinds in roles.items():
            if role in record:
                other = registry.registry()[record[role]]
                assert other["kind"] in kinds
                if role == "teacher":
                    same = ("resolution", "channels", "classes")
                    assert [other[key] for key in same] == [record[key] for key in same]
        if record["kind"] == "stylegan2":
            assert "teacher" in record or "no published teacher" in record["note"]
    assert len({name.rpartition(".")[0] for name in registry.registry()}) == len(registry.registry()), (
        "stems are unambiguous"
    )


def test_names_with_and_without_extension(small_registry, cache):
    assert registry.resolve("gan.pkl").read_bytes() == registry.resolve("gan").read_bytes() == b"gan"
    assert registry.entry("gan") == {"name": "gan.pkl", **small_registry["gan.pkl"]}
    assert registry.entry_for_path("/elsewhere/gan.pkl")["classes"] == 10
    assert registry.entry_for_path("/elsewhere/original.pkl")["name"] == "teacher.pkl", "as downloaded by hand"
    assert registry.entry_for_path("/elsewhere/gan") is registry.entry_for_path("network-snapshot-000100.pkl") is None


def test_an_existing_path_wins(small_registry, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    Path("gan.pkl").write_bytes(b"mine")
    assert registry.resolve("gan.pkl").read_bytes() == b"mine"
    assert registry.resolve(tmp_path) == tmp_path, "folders are paths too: data sets"


def test_downloads_once(small_registry, server, cache, capsys):
    path = registry.resolve("teacher", setting="teacher", kind="edm")
    assert path == cache / "teacher.pkl" and path.read_bytes() == CONTENT
    assert registry.resolve("teacher.pkl", offline=True) == path
    assert registry.resolve(f"{server.base}/ok/original.pkl") == path, "the URL of a known name is that name"
    assert server.requests == ["/ok/original.pkl"]
    assert [file.name for file in cache.iterdir() if file.is_file()] == ["teacher.pkl"]
    output = capsys.readouterr()
    assert output.out == output.err == "", "what is quick is not worth a line"


def test_companion(small_registry, server, cache):
    assert registry.companion(registry.resolve("gan"), "teacher") == cache / "teacher.pkl"
    assert (
        registry.companion(registry.resolve("gan"), "statistics") is None
        and registry.companion("other.pkl", "teacher") is None
    )


def test_urls_with_the_same_file_name_do_not_meet(server, cache):
    first, second = (registry.resolve(f"{server.base}/ok/{folder}/net.pkl?x=1") for folder in "ab")
    assert first != second and first.name.endswith("-net.pkl") and first.read_bytes() == second.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "path, reason",
    [("absent.pkl", "the server answers 404 "), ("short/x.pkl", "the connection ended ")],
)
def test_failed_downloads_say_where_to_put_the_file(server, cache, path, reason):
    url = f"{server.base}/{path}"
    with pytest.raises(InputError) as caught:
        registry.resolve(url, setting="teacher")
    message = str(caught.value)
    target = message.rpartition("save it as ")[2]
    assert message.startswith(f"teacher={url}: cannot download {url} ({reason}") and "\n" not in message
    assert Path(target).parent == cache and not any(path.is_file() for path in cache.iterdir())
    Path(target).write_bytes(b"by\0hand")
    assert registry.resolve(url).read_bytes() == b"by\0hand", "the place named is the place looked at"


def test_refused_connection(server, cache):
    with pytest.raises(InputError, match=r"cannot download http://127.0.0.1:9/x.pkl \(the server cannot be reached\)"):
        registry.resolve("http://127.0.0.1:9/x.pkl")


def test_wrong_hash_and_offline(small_registry, cache):
    with pytest.raises(InputError, match=r"wrong.pkl \(its SHA-256 is .* instead of 00000000"):
        registry.resolve("wrong")
    assert not any(path.is_file() and path.suffix != ".lock" for path in cache.rglob("*"))
    with pytest.raises(
        InputError, match="^network=teacher: teacher.pkl is not in the cache .* save it as .*teacher.pkl"
    ):
        registry.resolve("teacher", offline=True)


def test_names_that_cannot_be_used(small_registry, cache):
    with pytest.raises(
        InputError, match="^network=teachr is neither a file nor a name .*nearest names are teacher.pkl"
    ):
        registry.resolve("teachr")
    with pytest.raises(InputError, match="known names are gan.pkl, lost.pkl"):
        registry.resolve("zzzzzzzz")
    with pytest.raises(InputError, match="^network=runs/a.pkl: there is no such file"):
        registry.resolve("runs/a.pkl")
    with pytest.raises(InputError, match="lost.pkl belongs to this project but is missing"):
        registry.resolve("lost")
    with pytest.raises(InputError, match="^teacher=gan is of kind stylegan2, but `teacher` needs edm"):
        registry.resolve("gan", setting="teacher", kind="edm")
    with pytest.raises(
        InputError, match="'teachr' is not in pretrained/registry.json; the nearest names are teacher.pkl"
    ):
        registry.entry("teachr")


def test_a_home_of_nobody_is_a_name_like_others(small_registry, cache):
    with pytest.raises(InputError, match="^network=~no-such-user is neither a file nor a name"):
        registry.resolve("~no-such-user")
    for path in ("~no-such-user/x.pkl", "x/" + "y" * 5000, "x/\0"):
        with pytest.raises(InputError, match=f"^network={path}: there is no such file"):
            registry.resolve(path)
    with pytest.raises(InputError, match="is not in the cache and downloading is off"):
        registry.resolve("https://host.invalid/" + "y" * 5000, offline=True)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DI_REFINE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert registry.cache_folder() == tmp_path / ".cache" / "di-refine"


def test_offline_by_environment(small_registry, server, cache, monkeypatch):
    monkeypatch.setenv("DI_REFINE_OFFLINE", "1")
    with pytest.raises(InputError, match="downloading is off"):
        registry.resolve("teacher")
    monkeypatch.setenv("DI_REFINE_OFFLINE", "0")
    registry.resolve("teacher")


def test_an_altered_download_is_refused(small_registry, server, cache):
    path = registry.resolve(f"{server.base}/ok/unlisted.pkl")
    path.write_bytes(b"altered")
    with pytest.raises(InputError, match="is not what it was or should be: its SHA-256 is .* delete it"):
        registry.resolve(f"{server.base}/ok/unlisted.pkl", offline=True)
    path.unlink()
    assert registry.resolve(f"{server.base}/ok/unlisted.pkl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no table of records"),
        ('{"x": 1}', "'x' cannot be used: it is no object"),
        ('{"x": {"file": "x"}}', "its kind is none of"),
        ('{"x": {"kind": ["edm"], "file": "x"}}', "its kind is none of"),
        ('{"x": {"kind": "edm"}}', "either a file or a url"),
        ('{"x": {"kind": "edm", "url": 3}}', "its url is no text"),
        ('{"x": {"kind": "edm", "url": "https://[x"}}', "its url is none"),
        ('{"x": {"kind": "edm", "file": "../x"}}', "named without a folder"),
        ('{"../x": {"kind": "edm", "url": "https://x/y"}}', "named without a folder"),
        ('{"x": {"kind": "edm", "file": "x", "classes": "ten"}}', "its classes is no whole number"),
        ('{"x": {"kind": "edm", "file": "x", "refine": [1]}}', "its refine is no object"),
        ('{"x": {"kind": "edm", "file": "x", "metrics": "fid"}}', "its metrics is no list of texts"),
        ('{"x": {"kind": "edm", "file": "x", "metrics": [1]}}', "its metrics is no list of texts"),
    ],
)
def test_a_damaged_registry_is_named(tmp_path, monkeypatch, text, words):
    (tmp_path / "registry.json").write_text(text)
    monkeypatch.setattr(registry, "pretrained_folder", lambda: tmp_path)
    with pytest.raises(InputError, match=f"registry.json.*{words}.*; restore it"):
        registry.registry.__wrapped__()
