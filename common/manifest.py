from common.human.manifest import generate_manifest  # noqa: F401 - under the name that users import
