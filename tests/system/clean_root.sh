#!/bin/sh
# Try this checkout's last commit on a bare system: tests/system/clean_root.sh SUITE [COMMAND]
#
#   tests/system/clean_root.sh bookworm
#   tests/system/clean_root.sh trixie 'bin/vmnet --yes --version'
#   MIRROR=http://.../ubuntu COMPONENTS=main,universe KEYRING=/usr/share/keyrings/ubuntu-archive-keyring.gpg SCRIPT=jammy \
#       tests/system/clean_root.sh noble
#
# Needs root and debootstrap. It makes a minimal system of SUITE (from MIRROR; by default the first of this machine's apt),
# gives it a clone in /root/vmnet and what this machine has for reaching its mirrors (resolver, proxies, certificates), and
# runs COMMAND in the clone: by default the two commands of the README, without a terminal. Files, mounts and processes are
# the system's own; the network is this machine's, so COMMAND must not change it.
# Exit code: COMMAND's. KEEP=DIR leaves the system in DIR, or uses the one that is there.
set -eu
suite=$1
command=${2-'bin/vmnet --yes --version && bin/test --yes tests/unit'}
checkout=$(CDPATH='' cd -P -- "$(dirname -- "$0")/../.." && pwd -P)

root=${KEEP-}
if [ -z "$root" ]; then
    root=$(mktemp -d "${TMPDIR:-/var/tmp}/clean_root.XXXXXX")
    chmod 755 "$root"
    trap 'rm -rf --one-file-system "$root"' EXIT
fi
if [ ! -e "$root/etc/os-release" ]; then
    mirror=${MIRROR-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
    unshare --mount debootstrap --variant=minbase --components="${COMPONENTS:-main}" ${KEYRING:+--keyring="$KEYRING"} \
        "$suite" "$root" "$mirror" ${SCRIPT:+"/usr/share/debootstrap/scripts/$SCRIPT"} >&2
fi

for kept in /etc/hosts /etc/resolv.conf /etc/apt/auth.conf.d /usr/local/share/ca-certificates; do
    if [ -e "$kept" ]; then
        mkdir -p "$root${kept%/*}"
        cp -aL "$kept" "$root${kept%/*}/"
    fi
done
apt-config dump | grep -E '^Acquire::(https?::|Check-)' >"$root/etc/apt/apt.conf.d/90clean-root" || true
# No package may start its service: there is no init, and the network is not the system's own.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
rm -rf "$root/root/vmnet"
git -c safe.directory='*' clone -q --no-local "$checkout" "$root/root/vmnet"

# Nothing of the caller's environment but the way to the mirrors: on a bare system there is nothing else.
set -- PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
for name in http_proxy https_proxy no_proxy PIP_INDEX_URL PIP_TRUSTED_HOST; do
    eval "value=\${$name-}"
    if [ -n "$value" ]; then
        set -- "$@" "$name=$value"
    fi
done
# pivot_root, for the kernel makes no user namespace for a process in a chroot.
unshare --mount --propagation private --pid --fork --kill-child sh -euc '
    root=$1 command=$2
    shift 2
    mount --bind "$root" "$root"
    cd "$root"
    mount -t proc proc proc
    mount --rbind /sys sys
    mount --rbind /dev dev
    pivot_root . mnt
    umount -l mnt
    exec env -i "$@" chroot . sh -c "cd /root/vmnet && $command"
' sh "$root" "$command" "$@" </dev/null
