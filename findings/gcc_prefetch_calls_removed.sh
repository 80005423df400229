#!/usr/bin/env bash
# GCC 12.2 removes calls of a function that only prefetches, at every level from -O1 on: prefetching that is written as a helper
# function, or as a lambda that a template calls, silently does nothing.
#
# Packages: g++-12 12.2.0-14+deb12u1, the compiler of Debian 12, and for comparison g++-14 14.2.0-19, that of Debian 13, each
# with the C library and other libraries of its release. Debian's apt-get fetches them into a temporary folder, where they are
# unpacked and only translate to assembler. For x86-64; nothing is installed; MIRROR=... names another mirror of Debian.
#
# GCC 12 records what memory each function reads and writes (-fipa-modref). 12.2 does not count __builtin_prefetch as an effect,
# and drops the calls of a function that then seems to have none. What was inlined before that analysis stays, so that -O3
# may keep what -O2 drops, and a longer lambda is dropped where a short one is kept. GCC's description of the builtin says
# nothing of this; pull request 361 of intel/ScalableVectorSearch saw GCC 12 lose most prefetches of a loop. The same files keep
# theirs with GCC 11.3, 12.4, 13.3 and 14.2 and with clang 18. Ways out: `asm volatile("prefetcht0 %0" : : "m"(*p))`, or
# -fno-ipa-modref. Look for the prefetches in the assembler.
#
# Output seen, at -O1, -O2 and -O3 (1+2: one prefetch instruction and two calls in the assembler):
#   GCC 12.2.0  a function             0+0 0+0 0+0    with asm 1+1 4+1 4+1    with -fno-ipa-modref 1+1 4+1 4+1
#   GCC 12.2.0  a lambda of one loop   0+0 0+0 1+0    with asm 1+0 1+0 1+0    with -fno-ipa-modref 1+0 1+0 1+0
#   GCC 12.2.0  a lambda of two loops  0+0 0+0 0+0    with asm 2+0 2+0 2+0    with -fno-ipa-modref 2+0 2+0 2+0
#   GCC 14.2.0: none is missing
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
mirror=${MIRROR:-$(apt-get indextargets --format '$(SITE)' | awk '/\/debian\/?$/ {site = $0} END {print site}')}
libraries="libc6 libgmp10 libisl23 libmpc3 libmpfr6 libzstd1 zlib1g"

unpack() {  # unpack RELEASE PACKAGE...: into $tmp/RELEASE
    local root=$tmp/$1
    mkdir -p "$root/apt/lists/partial" "$root/apt/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" > "$root/apt/sources.list"
    local get=(apt-get -qq -o Dir::State::lists="$root/apt/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$root/apt"
        -o Dir::Etc::SourceList="$root/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null -o APT::Sandbox::User=root)
    "${get[@]}" update
    (cd "$root" && "${get[@]}" download "${@:2}" && for package in *.deb; do dpkg-deb -x "$package" .; done)
}
unpack bookworm g++-12=12.2.0-14+deb12u1 $libraries
unpack trixie g++-14-x86-64-linux-gnu=14.2.0-19 $libraries

cat > "$tmp/function.cpp" <<'CPP'
__attribute__((noinline)) static void ahead(const char* from, int lines) {
    for (int i = 0; i < lines; ++i) PREFETCH(from + 64 * i);
}
float sum(const float* x, int n) {
    float s = 0;
    for (int i = 0; i < n; ++i) {
        ahead((const char*)(x + 16 * i), 4);
        s += x[16 * i];
    }
    return s;
}
CPP
cat > "$tmp/lambda.cpp" <<'CPP'
template <class Fetch>
static float sum_rows(const float* x, int rows, int inner, const Fetch& fetch) {
    float s = 0;
    for (int i = 0; i < rows; ++i) {
        fetch(i + 1, i, rows);
        for (int j = 0; j < inner; ++j) s += x[i * inner + j];
    }
    return s;
}
float sum(const float* x, const float* y, int rows, int inner) {
    return sum_rows(x, rows, inner, [&](int row, int part, int of) {
        const long bytes = 4l * inner, first = bytes * part / of / 64 * 64, end = bytes * (part + 1) / of;
        for (long i = first; i < end; i += 64) PREFETCH((const char*)(x + row * inner) + i);
#ifdef TWO
        for (long i = first; i < end; i += 64) PREFETCH((const char*)(y + row * inner) + i);
#endif
    });
}
CPP

cat > "$tmp/case.py" <<'PY'
import glob
import re
import subprocess
import sys

folder = sys.argv[1]
BUILTIN = "-DPREFETCH(p)=__builtin_prefetch(p)"
ASM = '-DPREFETCH(p)=asm volatile("prefetcht0 %0" : : "m"(*(p)))'
CASES = {
    "a function": ("function.cpp",), "a lambda of one loop": ("lambda.cpp",), "a lambda of two loops": ("lambda.cpp", "-DTWO"),
}


def counts(release: str, *arguments: str) -> tuple[str, list[tuple[int, int]]]:
    """The version, and for -O1, -O2 and -O3 the number of prefetch instructions and of calls."""
    root = f"{folder}/{release}"
    libraries = ":".join(f"{root}{at}/lib/x86_64-linux-gnu" for at in ("", "/usr"))
    loader, = {*glob.glob(f"{root}/lib64/ld-linux-x86-64.so.2"), *glob.glob(f"{root}/usr/lib64/ld-linux-x86-64.so.2")}
    compiler, = glob.glob(f"{root}/usr/lib*/gcc/x86_64-linux-gnu/*/cc1plus")
    found = []
    for level in ("-O1", "-O2", "-O3"):
        command = [loader, "--library-path", libraries, compiler, "-quiet", "-o", "-", level, *arguments]
        text = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
        found.append((len(re.findall(r"^\s+prefetch", text, re.M)), len(re.findall(r"^\s+call", text, re.M))))
    return re.search(r'"GCC: .* (\d+\.\d+\.\d+)"', text)[1], found


def row(found: list[tuple[int, int]]) -> str:
    return " ".join(f"{prefetches}+{calls}" for prefetches, calls in found)


old = {}
for release in ("bookworm", "trixie"):
    for name, arguments in CASES.items():
        version, plain = counts(release, BUILTIN, *arguments)
        _, in_asm = counts(release, ASM, *arguments)
        _, without = counts(release, BUILTIN, "-fno-ipa-modref", *arguments)
        print(f"GCC {version}  {name:21} {row(plain)}    with asm {row(in_asm)}    with -fno-ipa-modref {row(without)}")
        assert all(prefetches for prefetches, _ in in_asm + without), "prefetches are removed here too"
        if release == "bookworm":
            old[name] = plain
        else:
            assert all(prefetches for prefetches, _ in plain), f"GCC {version} removes them too"
assert old["a function"] == old["a lambda of two loops"] == [(0, 0)] * 3, "the prefetches stay now"
assert old["a lambda of one loop"][:2] == [(0, 0)] * 2 and old["a lambda of one loop"][2][0], "inlining is another one now"
PY
cd "$tmp"
"${PYTHON:-python3}" case.py "$tmp"
