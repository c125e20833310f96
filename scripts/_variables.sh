# Sourced by the other helpers: variables of the environment, checked before anything starts.

clean() {
    # Names of variables that hold one value each: blanks and newlines around it are removed, lines within it refused.
    local name value
    for name in "$@"; do
        value="${!name:-}"
        if [ -z "$value" ]; then continue; fi
        value="${value#"${value%%[![:space:]]*}"}"
        value="${value%"${value##*[![:space:]]}"}"
        if [[ "$value" == *$'\n'* ]]; then
            echo "error: $name holds several lines, expected one value" >&2
            exit 2
        fi
        printf -v "$name" '%s' "$value"
    done
}

whole() {
    # $1: name of a variable; $2, $3: least and largest whole number that it may hold, if it is set.
    local value="${!1:-}"
    if [ -z "$value" ]; then return; fi
    if [[ ! "$value" =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2 || 10#$value > $3)); then
        echo "error: $1 is '$value', expected a whole number from $2 to $3" >&2
        exit 2
    fi
}

one_word() {
    # $1: name of a variable that must not look like a flag.
    if [[ "${!1:-}" == -* ]]; then
        echo "error: $1 is '${!1}', expected a value that does not begin with -" >&2
        exit 2
    fi
}

processes() {
    # What decides how many processes there are, and where they meet.
    clean GPUS NODES NODE_RANK MASTER_ADDR MASTER_PORT PYTHON
    whole GPUS 0 1024
    whole NODES 1 100000
    whole NODE_RANK 0 "$((10#${NODES:-1} - 1))"
    whole MASTER_PORT 1 65535
    one_word MASTER_ADDR
}

path_of() {
    # $1: a path, which may begin with -. Prints it so that no program takes it for a flag.
    case "$1" in
    -*) printf './%s' "$1" ;;
    *) printf '%s' "$1" ;;
    esac
}

interpreter() {
    # $1: folder of the project. Prints PYTHON, else the project's own Python, else python3.
    if [ -n "${PYTHON:-}" ]; then
        printf '%s' "$PYTHON"
    elif [ -x "$1/.venv/bin/python" ]; then
        printf '%s' "$1/.venv/bin/python"
    else
        printf 'python3'
    fi
}
