#!/usr/bin/env bash
# Build the documentation site into output/site; any warning is an error. Further arguments go to mkdocs build.
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
install_project "docs"

echo "== site"
export NO_MKDOCS_2_WARNING=1 # an advertisement of the theme, no fault of the pages
.venv/bin/python -m mkdocs build --strict "$@"
echo "Open $root/output/site/index.html, or run .venv/bin/python -m mkdocs serve."
