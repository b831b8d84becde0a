// Our kernels behind ATen's own operators, for the whole process.
#pragma once
#include <string>
#include <vector>

namespace relu_ext {

// Twice is as good as once. Not to be called while other threads register operators; calls of the operators go on.
// Throws, with nothing installed, where another library has put a kernel of its own in the same place.
void install();
void uninstall();
bool is_installed();

// Those that install() concerns, as "aten::relu".
std::vector<std::string> installable();

}  // namespace relu_ext
