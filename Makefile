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
.PHONY: all help deps demo test test-programs test-real asan asan-programs valgrind fuzz fuzz-programs bench clean install
.DELETE_ON_ERROR:

all: $(BIN)/r1 $(BIN)/r1-convert

help:
	@echo "make            build r1 and r1-convert"
	@echo "make demo       install what is missing, build, and ask the demo model a question"
	@echo "make test       install what is missing and run the tests (ONLY=\"golden cli\" runs those groups)"
	@echo "make deps       install what is missing and nothing else (FOR=test: for the tests, too)"
	@echo "make asan       run the tests on a build with the address and undefined-behaviour sanitizers"
	@echo "make valgrind   run one case per command and per parser under valgrind"
	@echo "make fuzz       fuzz every parser (SECONDS=60 for each)"
	@echo "make test-real  download a 135M-parameter model (270 MB on disk) and check r1 against its reference output"
	@echo "make bench      prefill and decode speed (MODEL=r1-distill-qwen-1.5b:q8, or a file)"
	@echo "make install    copy r1 and r1-convert to PREFIX/bin (PREFIX=$(PREFIX))"
	@echo "make clean      remove everything that was built"

# ---- the programs

CONVERT_OBJECTS := $(patsubst convert/%.c,$(BUILD)/convert/%.o,$(wildcard convert/*.c))

$(BIN)/r1: $(BUILD)/r1.o $(BUILD)/tokenizer.o
	$(CC) $(FLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)

$(BIN)/r1-convert: $(CONVERT_OBJECTS) $(BUILD)/tokenizer.o
	$(CC) $(FLAGS) $(LDFLAGS) -o $@ $^ $(filter-out -lopenblas,$(LIBS))

# The demo model is linked into r1, so it is there wherever the program is.
$(BUILD)/demo.r1: $(BIN)/r1-convert $(wildcard demo/*.json demo/*.safetensors)
	$(BIN)/r1-convert demo $@ --type source --force

$(BUILD)/r1.o: private FLAGS += -DR1_DEMO_FILE='"$(BUILD)/demo.r1"'
$(BUILD)/r1.o: $(BUILD)/demo.r1

$(BUILD)/%.o: %.c Makefile $(BUILD)/packages
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(CPPFLAGS) -MMD -MP -c -o $@ $<

# ---- what has to be installed

# Tries every header and library in one compilation; only when that fails, one by one, to say which packages are missing.
# $1: "check" says what is missing and fails, "install" installs it. $2: "test" where the tests' own needs count, too.
define PACKAGES
program() { for header; do echo "#include <$$header>"; done; echo 'int main(void) { return 0; }'; }
links()   { $(CC) $(filter-out -fopenmp,$(FLAGS)) $(CPPFLAGS) -x c - -o $(BUILD)/packages.out $(filter -L%,$(LIBS)) "$$@" >/dev/null 2>&1; }
clang_links() { program stdio.h | clang "$$@" -x c - -o $(BUILD)/packages.out >/dev/null 2>&1; }
has()     { command -v "$$1" >/dev/null; }
if has apt-get; then system=apt; elif has dnf; then system=dnf; else system=other; fi
missing=
need() { # DEBIAN'S PACKAGE, FEDORA'S, HOMEBREW'S
    case $$system in apt) missing="$$missing $$1" ;; dnf) missing="$$missing $$2" ;; *) missing="$$missing $$3" ;; esac
}

mkdir -p $(BUILD)
if ! program stdio.h omp.h cblas.h pcre2.h utf8proc.h jansson.h xxhash.h | links -fopenmp $(LIBS); then
    program stdio.h | $(CC) -x c - -o $(BUILD)/packages.out 2>/dev/null || need 'gcc libc6-dev' 'gcc glibc-devel' llvm
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
rm -f $(BUILD)/packages.out
missing=$$(printf '%s\n' $$missing | awk '!seen[$$0]++')
[ -n "$$missing" ] || exit 0

as_root=
[ "$$(id -u)" = 0 ] || as_root='sudo '
if [ "$$1" = install ] && [ $$system = apt ]; then
    $${as_root}apt-get update -q || exit 1
fi
# Where clang's sanitizer and fuzzer libraries are depends on the release.
if [ $$system = apt ]; then
    version=$$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\)$$/\1/p')
    for runtime in libclang-rt-dev libclang-rt-$$version-dev libclang-common-$$version-dev; do
        apt-cache show $$runtime >/dev/null 2>&1 && break
    done
    missing=$$(echo "$$missing" | sed "s/CLANG-RUNTIME/$$runtime/")
fi
missing=$$(echo $$missing)
case $$system in
apt)  install="apt-get install -y --no-install-recommends $$missing" ;;
dnf)  install="dnf install -y $$missing" ;;
*)    install="brew install $$missing"; as_root= ;;
esac
if [ "$$1" = install ] && [ $$system = apt ]; then
    echo "Installing $$missing"
    $${as_root}env DEBIAN_FRONTEND=noninteractive $$install
else
    echo "These packages are missing: $$missing" >&2
    echo "Install them with:  $$as_root$$install" >&2
    exit 1
fi
endef
export PACKAGES

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
	$(CC) $(FLAGS) $(CPPFLAGS) $(LDFLAGS) -MMD -MP -MF $@.d -o $@ $< $(BUILD)/tokenizer.o $(LIBS)

test-programs: $(TEST_PROGRAMS)

test:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) all test-programs
	@CC="$(CC)" tests/run.sh $(ONLY)

# Without optimisation: a third of the time to compile, and the tests of small models still run fast.
SANITIZE := -O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan-programs:
	@$(PARALLEL) BUILD=build/asan BIN=build/asan CFLAGS="$(SANITIZE)" all test-programs

asan:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) asan-programs
	@tests/run.sh --build build/asan $(ONLY)

valgrind:
	@command -v valgrind >/dev/null || { echo "valgrind is missing: apt-get install valgrind" >&2; exit 1; }
	@$(PARALLEL) CFLAGS="-O2 -g" BUILD=build/valgrind BIN=build/valgrind all test-programs
	@tests/run.sh --build build/valgrind valgrind

# The fuzzers run from the seeds that tests/fuzz/seeds.sh makes of the tests' files.
SECONDS ?= 60
FUZZERS := $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/*.c))
FUZZ_FLAGS := -O1 -g -DTESTING -Wno-unused-function -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined

build/fuzz/%: tests/fuzz/%.c tokenizer.c tokenizer.h Makefile
	@mkdir -p $(@D)
	clang $(FLAGS) $(FUZZ_FLAGS) $(CPPFLAGS) -MMD -MP -MF $@.d -o $@ $< tokenizer.c $(LIBS)

fuzz-programs: $(FUZZERS)

fuzz:
	@$(MAKE) --no-print-directory deps FOR=test
	@$(PARALLEL) all fuzz-programs
	@tests/run.sh --fuzz-seconds $(SECONDS) fuzz

test-real:
	@$(MAKE) --no-print-directory deps
	@$(PARALLEL) all test-programs
	@tests/run.sh real

MODEL ?= r1-distill-qwen-1.5b:q8
bench: all
	$(BIN)/r1 bench $(MODEL)

install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install $(BIN)/r1 $(BIN)/r1-convert $(DESTDIR)$(PREFIX)/bin

clean:
	rm -rf build r1 r1-convert

-include $(wildcard $(BUILD)/*.d $(BUILD)/convert/*.d $(BUILD)/tests/*.d build/fuzz/*.d)
