// Applies an elementary function of the kernels to numbers, fp32, 16 at a time: functions NAME NUMBERS RESULTS

#include <fstream>
#include <string>

#include "functions.h"

int main(int count, char **arguments) {
    if (count != 4) return 2;
    std::string name = arguments[1];
    std::ifstream numbers(arguments[2], std::ios::binary);
    std::ofstream results(arguments[3], std::ios::binary);
    char block[64];
    while (numbers.read(block, sizeof block)) {
        f32x16 x = load<f32x16>(block), y;
        if (name == "exp") y = exp_of(x);
        else if (name == "exp2") y = exp2_of(x);
        else if (name == "sigmoid") y = sigmoid_of(x);
        else if (name == "tanh") y = tanh_of(x);
        else if (name == "erf") y = erf_of(x);
        else if (name == "expm1") y = expm1_of(x);
        else if (name == "log1p") y = log1p_of(x);
        else return 2;
        store(block, y);
        results.write(block, sizeof block);
    }
    return results.flush() ? 0 : 1;
}
