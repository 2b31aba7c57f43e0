# What mount-scripts/try and tests/run share: messages, packages, and a look at FUSE. Sourced, never
# run; it changes nothing by being sourced.
# shellcheck shell=bash

say() { printf '\n== %s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Whether a command exists; sbin is where Debian keeps servers and it is not in everybody's PATH.
has() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

has_c_compiler() {
    has cc && printf '#include <stdio.h>\n' | cc -E -x c - >/dev/null 2>&1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        die "'$*' needs root and there is no sudo here; run it as root, then start this again"
    fi
}

# install_packages PACKAGE…: installs Debian packages; does nothing when there are none to install.
install_packages() {
    [ $# -gt 0 ] || return 0
    has apt-get || die "please install $* (or what your distribution calls them), then start this again"
    say "installing $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

need_cargo() {
    has cargo || die "Rust is missing; install it from https://rustup.rs, then start this again"
}

need_fuse() {
    if [ ! -e /dev/fuse ] && { [ "$(id -u)" -eq 0 ] || has sudo; }; then
        # Whether it helped is seen below.
        as_root modprobe fuse 2>/dev/null || true
    fi
    [ -c /dev/fuse ] || die "/dev/fuse is missing, so nothing can be mounted; load the kernel module \
'fuse', or start the container with --device /dev/fuse --cap-add SYS_ADMIN"
}
