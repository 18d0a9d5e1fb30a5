# r1.c: `make demo` installs what is missing, builds, and asks the demo model a question; `make help` lists the rest.

PREFIX  ?= /usr/local
CFLAGS  ?= -O3
BUILD   ?= build
BIN     ?= .

# -ffp-contract=off: a compiler that fuses a multiply and an add on its own would change the last bits from build to build.
# Instruction sets are chosen when the program runs (target attributes), so there is no -march here.
FLAGS   := -std=gnu11 $(CFLAGS) -fopenmp -ffp-contract=off -Wall -Wextra $(EXTRA)
MODULES := libpcre2-8 libutf8proc jansson libxxhash
LIBS    := $(or $(shell pkg-config --libs openblas $(MODULES) 2>/dev/null),-lopenblas -lpcre2-8 -lutf8proc -ljansson -lxxhash) -lm
FLAGS   += $(or $(shell pkg-config --cflags openblas $(MODULES) 2>/dev/null),$(addprefix -I,$(wildcard /usr/include/openblas)))
FLAGS   += -DPCRE2_CODE_UNIT_WIDTH=8

CPUS    := $(or $(shell getconf _NPROCESSORS_ONLN 2>/dev/null),2)
# A sub-make that may use every processor, unless -j was given above it already.
PARALLEL = $(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(CPUS))

.DEFAULT_GOAL := all
.PHONY: all help deps demo test test-programs test-real asan asan-programs arm64-programs valgrind fuzz \
        fuzz-programs bench clean install
.DELETE_ON_ERROR:

all: $(BIN)/r1 $(BIN)/r1-convert

help:
	@echo "make            build r1 and r1-convert"
	@echo "make demo       install what is missing, build, and ask the demo model a question"
	@echo "make test       install what is missing and run the tests (ONLY=\"golden cli\" runs those groups, V=1 shows each check)"
	@echo "make deps       install what is missing and nothing else (FOR=test: for the tests, too)"
	@echo "make asan       run the tests on a build with the address and undefined-behaviour sanitizers"
	@echo "make valgrind   run one case per command and per parser under valgrind"
	@echo "make fuzz       fuzz every parser (SECONDS=60 for each)"
	@echo "make test-real  download a 135M-parameter model (270 MB on disk) and check r1 against its reference output"
	@echo "make bench      what this machine runs, and how fast, in 3 minutes (MODEL=r1-distill-qwen-1.5b:q8, or a file: that one)"
	@echo "make install    copy r1 and r1-convert to PREFIX/bin (PREFIX=$(PREFIX))"
	@echo "make clean      remove everything that was built"

# ---- the programs

CONVERT_OBJECTS := $(patsubst convert/%.c,$(BUILD)/convert/%.o,$(wildcard convert/*.c))

$(BIN)/r1: $(BUILD)/r1.o $(BUILD)/tokenizer.o
	$(CC) $(FLAGS) $(LDFLAGS) -o $@ $^ $(LIBS) $(OR_EXPLAIN)

$(BIN)/r1-convert: $(CONVERT_OBJECTS) $(BUILD)/tokenizer.o
	$(CC) $(FLAGS) $(LDFLAGS) -o $@ $^ $(filter-out -lopenblas,$(LIBS)) $(OR_EXPLAIN)

# The demo model is linked into r1, so it is there wherever the program is.
$(BUILD)/demo.r1: $(BIN)/r1-convert $(wildcard demo/*.json demo/*.safetensors)
	$(BIN)/r1-convert demo $@ --type source --force

$(BUILD)/r1.o: private FLAGS += -DR1_DEMO_FILE='"$(BUILD)/demo.r1"'
$(BUILD)/r1.o: $(BUILD)/demo.r1

$(BUILD)/%.o: %.c Makefile $(BUILD)/packages
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(CPPFLAGS) -MMD -MP -c -o $@ $< $(OR_EXPLAIN)

# ---- what has to be installed

# Tries every header and library in one compilation; only when that fails, one by one, to say which packages are missing.
# $1: "check" says what is missing and fails, "install" installs it, "explain" is "check" behind a command that failed, and fails
# as well. $2: "test" where the tests' own needs count, too.
define PACKAGES
program() { for header; do echo "#include <$$header>"; done; echo 'int main(void) { return 0; }'; }
links()   { $(CC) $(filter-out -fopenmp,$(FLAGS)) $(CPPFLAGS) -x c - -o "$$out" $(filter -L%,$(LIBS)) "$$@" >/dev/null 2>&1; }
clang_links() { program stdio.h | clang "$$@" -x c - -o "$$out" >/dev/null 2>&1; }
has()     { command -v "$$1" >/dev/null; }
if has apt-get; then system=apt; elif has dnf; then system=dnf; else system=other; fi
out=$(BUILD)/packages.$$$$
missing=
need() { # DEBIAN'S PACKAGE, FEDORA'S, HOMEBREW'S
    case $$system in apt) missing="$$missing $$1" ;; dnf) missing="$$missing $$2" ;; *) missing="$$missing $$3" ;; esac
}

mkdir -p $(BUILD)
if ! program stdio.h omp.h cblas.h pcre2.h utf8proc.h jansson.h xxhash.h | links -fopenmp $(LIBS); then
    program stdio.h | $(CC) -x c - -o "$$out" 2>/dev/null || need 'gcc libc6-dev' 'gcc glibc-devel' llvm
    if ! program omp.h | links -fopenmp; then
        case "$$($(CC) --version 2>/dev/null)" in
        *clang*) need libomp-dev libomp-devel libomp ;;
        *)       need gcc gcc libomp ;;
        esac
    fi
    program cblas.h    | links -lopenblas || need libopenblas-openmp-dev openblas-devel openblas
    program pcre2.h    | links -lpcre2-8  || need libpcre2-dev pcre2-devel pcre2
    program utf8proc.h | links -lutf8proc || need libutf8proc-dev utf8proc-devel utf8proc
    program jansson.h  | links -ljansson  || need libjansson-dev jansson-devel jansson
    program xxhash.h   | links -lxxhash   || need libxxhash-dev xxhash-devel xxhash
fi
if [ "$$2" = test ]; then
    has xz                                    || need xz-utils xz xz
    has clang                                 || need clang clang llvm
    clang_links -fopenmp                      || need libomp-dev libomp-devel libomp
    clang_links -fsanitize=fuzzer-no-link,address || need CLANG-RUNTIME compiler-rt llvm
fi
rm -f "$$out"
missing=$$(printf '%s\n' $$missing | awk '!seen[$$0]++')
if [ -z "$$missing" ]; then
    [ "$$1" != explain ]
    exit
fi

# Where clang's sanitizer and fuzzer libraries are depends on the release.
name_runtime() {
    version=$$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\)$$/\1/p')
    for runtime in libclang-rt-dev libclang-rt-$$version-dev libclang-common-$$version-dev; do
        apt-cache show $$runtime >/dev/null 2>&1 && break
        runtime=libclang-rt-dev
    done
    packages=$$(echo $$missing | sed "s/CLANG-RUNTIME/$$runtime/")
}
known() { for package in $$packages; do apt-cache show $$package >/dev/null 2>&1 || return 1; done; }
packages=$$(echo $$missing)
[ $$system != apt ] || name_runtime
case $$system in
apt)  install="apt-get install -y --no-install-recommends" ;;
dnf)  install="dnf install -y" ;;
*)    install="brew install" ;;
esac

if [ "$$1" = install ] && [ $$system = apt ]; then
    sudo=sudo
    [ "$$(id -u)" != 0 ] || sudo=
    if [ -z "$$sudo" ] || has sudo; then
        quiet="-qq -o Dpkg::Use-Pty=0"
        update="apt-get $$quiet update"
        # The lists of packages may be absent, as in a container, or so old that they lead nowhere.
        if ! known; then
            echo "Missing: $$packages; fetching the package lists with: $${sudo:+sudo }apt-get update"
            $$sudo $$update && name_runtime || sudo=failed
        fi
        if [ "$$sudo" != failed ]; then
            echo "Missing: $$packages; installing with: $${sudo:+sudo }$$install $$packages"
            echo "(a minute or two; only errors are shown)"
            install_quietly="DEBIAN_FRONTEND=noninteractive $$install $$quiet $$packages >/dev/null"
            $$sudo sh -c "$$install_quietly || { $$update && $$install_quietly; }" && exit
        fi
    fi
fi
echo "These packages are missing: $$packages" >&2
case $$system in
apt|dnf) echo "Install them with (as root): $$install $$packages" >&2 ;;
*)       echo "Install them with: $$install $$packages" >&2 ;;
esac
exit 1
endef
export PACKAGES

# Behind a compiler's command: packages are looked for once (the stamp below); one that went away since is named when it is
# missed.
OR_EXPLAIN = || sh -c "$$PACKAGES" packages explain

$(BUILD)/packages: Makefile
	@sh -c "$$PACKAGES" packages check
	@touch $@

deps:
	@sh -c "$$PACKAGES" packages install $(FOR) </dev/null

# ---- use and tests

demo:
	@$(MAKE) --no-print-directory deps
	@$(PARALLEL) all
	$(BIN)/r1 run demo "How many r's are in strawberry?"

# The programs of the tests, each one file; some include r1.c whole, without its main.
TEST_PROGRAMS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/*.c))

$(BUILD)/tests/%: private FLAGS += -DTESTING -Wno-unused-function
$(BUILD)/tests/%: tests/%.c $(BUILD)/tokenizer.o Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(CPPFLAGS) $(LDFLAGS) -MMD -MP -MF $@.d -o $@ $< $(BUILD)/tokenizer.o $(LIBS) $(OR_EXPLAIN)

test-programs: $(TEST_PROGRAMS)

RUN_TESTS = tests/run.sh $(if $(V),-v)

test:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) all test-programs
	@CC="$(CC)" $(RUN_TESTS) $(ONLY)

# Without optimisation: a third of the time to compile, and the tests of small models still run fast.
SANITIZE := -O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan-programs:
	@$(PARALLEL) BUILD=build/asan BIN=build/asan CFLAGS="$(SANITIZE)" all test-programs

asan:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) asan-programs
	@$(RUN_TESTS) --build build/asan $(ONLY)

# The test of the kernels as a program for 64-bit ARM, which qemu runs as several processors. All it takes of the target is libc:
# the headers of r1.c's libraries are this machine's, and the functions that call them are left out, since the test does not.
ARM64_CC ?= aarch64-linux-gnu-gcc
ARM64_FLAGS = $(filter-out -fopenmp,$(FLAGS)) -fopenmp-simd -DTESTING -Wno-unused-function -static \
              $(addprefix -idirafter,$(wildcard /usr/include/*-linux-gnu))

$(BUILD)/arm64/kernels: tests/kernels.c Makefile
	@mkdir -p $(@D)
	$(ARM64_CC) $(ARM64_FLAGS) $(CPPFLAGS) -MMD -MP -MF $@.d -o $@ $< -lm

arm64-programs: $(BUILD)/arm64/kernels

valgrind:
	@command -v valgrind >/dev/null || { echo "valgrind is missing: apt-get install valgrind" >&2; exit 1; }
	@$(PARALLEL) CFLAGS="-O2 -g" BUILD=build/valgrind BIN=build/valgrind all test-programs
	@$(RUN_TESTS) --build build/valgrind valgrind

# The fuzzers run from the seeds that tests/fuzz/seeds.sh makes of the tests' files.
SECONDS ?= 60
FUZZERS := $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/*.c))
# -Wno-pass-failed: between the sanitizers' checks clang vectorises no loop, and would say so of each "omp simd".
FUZZ_FLAGS := -O1 -g1 -DTESTING -Wno-unused-function -Wno-pass-failed \
              -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined

build/fuzz/tokenizer.o: tokenizer.c tokenizer.h Makefile
	@mkdir -p $(@D)
	clang $(FLAGS) $(FUZZ_FLAGS) $(CPPFLAGS) -c -o $@ $<

build/fuzz/%: tests/fuzz/%.c build/fuzz/tokenizer.o Makefile
	@mkdir -p $(@D)
	clang $(FLAGS) $(FUZZ_FLAGS) $(CPPFLAGS) -MMD -MP -MF $@.d -o $@ $< build/fuzz/tokenizer.o $(LIBS)

fuzz-programs: $(FUZZERS)

fuzz:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) all fuzz-programs
	@$(RUN_TESTS) --fuzz-seconds $(SECONDS) fuzz

test-real:
	@$(MAKE) --no-print-directory deps
	@$(PARALLEL) all test-programs
	@$(RUN_TESTS) real

bench: all
	$(BIN)/r1 bench $(MODEL)

install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install $(BIN)/r1 $(BIN)/r1-convert $(DESTDIR)$(PREFIX)/bin

clean:
	rm -rf build r1 r1-convert

-include $(wildcard $(BUILD)/*.d $(BUILD)/convert/*.d $(BUILD)/tests/*.d $(BUILD)/arm64/*.d build/fuzz/*.d)
