// Replays runs that tests/recording.py recorded with a library of the kernels, as kvgen loads it:
// replay LIBRARY RECORDING THREADS RESULTS [EXPECTED]
//
// Runs the operations one by one and writes to RESULTS what each wrote to its slot, and after each run the memory that
// it may change. EXPECTED: another processor's results, from which each operation continues, so that differences do not
// spread and each operation is judged alone.

#include <cstdlib>
#include <dlfcn.h>
#include <fstream>
#include <iostream>

#include "structs.h"

namespace {

struct Recording {
    std::ifstream file;
    char *image = nullptr;

    explicit Recording(const char *path) : file(path, std::ios::binary) {
        file.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
        int64_t size = number();
        image = static_cast<char *>(std::aligned_alloc(64, (size + 63) / 64 * 64));
        file.read(image, size);
        for (int64_t left = number(); left > 0; left--) { // pointers are stored as offsets
            char *at = image + number(), *target = image + *reinterpret_cast<int64_t *>(at);
            std::memcpy(at, &target, sizeof target);
        }
    }
    int64_t number() {
        int64_t n;
        file.read(reinterpret_cast<char *>(&n), sizeof n);
        return n;
    }
};

} // namespace

int main(int count, char **arguments) {
    if (count < 5) return 2;
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        std::cerr << dlerror() << std::endl;
        return 2;
    }
    auto run_kernels = reinterpret_cast<void (*)(const Run *, int)>(dlsym(library, "kvgen_run"));
    Recording recording(arguments[2]);
    int threads = std::atoi(arguments[3]);
    std::ofstream results(arguments[4], std::ios::binary);
    std::ifstream expected;
    if (count > 5) expected.open(arguments[5], std::ios::binary);
    for (int64_t runs = recording.number(); runs > 0; runs--) {
        Run run = *reinterpret_cast<const Run *>(recording.image + recording.number());
        const Op *ops = run.ops;
        int total = std::exchange(run.count, 1);
        for (int i = 0; i < total; i++) {
            run.ops = ops + i;
            run_kernels(&run, threads);
            char *written = reinterpret_cast<char *>(run.slots[ops[i].dst]);
            int64_t size = int64_t(run.rows) * run.widths[ops[i].dst] * 4;
            results.write(written, size);
            if (count > 5) expected.read(written, size);
        }
        for (int64_t ranges = recording.number(); ranges > 0; ranges--) {
            char *at = recording.image + recording.number();
            int64_t size = recording.number();
            results.write(at, size);
            if (count > 5) expected.ignore(size);
        }
    }
    return results.flush() && (count == 5 || expected) ? 0 : 1;
}
