from common.human.study import generate_manifest  # noqa: F401 - under the name that users import
