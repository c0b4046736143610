"""The public surface is what `__all__` says, and all of it can be had."""

import halfbyte


def test_public_names():
    verbs = ["heal", "load", "pack", "quantize", "quantize_folder", "save"]
    assert halfbyte.__all__ == ["PRESETS", "HalfbyteConfig", "HalfbyteError", "Recipe", *verbs]
    assert all(getattr(halfbyte, name) is not None for name in halfbyte.__all__)
    assert set(halfbyte.__all__) <= set(dir(halfbyte))


def test_heal_is_a_verb_before_and_after_its_folder_is_imported():
    from halfbyte.heal.verb import heal

    assert callable(halfbyte.heal)
    assert callable(heal)


def test_the_version_is_the_packages():
    import importlib.metadata

    assert halfbyte.__version__ == importlib.metadata.version("halfbyte")
