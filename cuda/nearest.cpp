// The nearest code to each row, without the matrix of scores. Plain C++17: no torch headers, no intrinsics, no OpenMP.
//
// Letters: n rows z, k codes c, both of width d; g groups, each with rows and codes of its own.
//
// Euclidean: argmax of (z - m).(c - m) - |c - m|^2 / 2 with m amid the codes, which is argmin of |z - c|. Up to width 3,
// where codes lie close together, argmax of -|z - c|^2 itself.
// Cosine: argmax of z.(c / |c| - m), since z.m is the same for all codes; dot: argmax of z.(c - m).
//
// Codes are packed, a chunk that fits the L2 cache at a time, into panels: d x LANES * VECTORS, the codes side by side
// in the lanes. For ROWS rows at once the scores of a panel stay in registers; each lane remembers its best score and
// the vector it came in. Nothing of size n x k exists. Every code's score is made by the same operations in the same
// order wherever it lies, so equal codes score equal bit for bit, and the lowest id wins.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__) && !defined(WITHOUT_AMX)
#define WITH_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 8, VECTORS = 3;  // 24 of 32 registers hold scores
#elif defined(__aarch64__)
constexpr int BYTES = 16, ROWS = 6, VECTORS = 4;  // 24 of 32
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 4, VECTORS = 2;  // 8 of 16
#else
constexpr int BYTES = 16, ROWS = 4, VECTORS = 2;
#endif

typedef float Floats __attribute__((vector_size(BYTES), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(BYTES)));

constexpr int LANES = BYTES / 4;
constexpr int PANEL = LANES * VECTORS;  // codes of one panel
#ifdef WITH_AMX
constexpr std::int64_t CHUNK_FLOATS = 1 << 18;  // of packed codes: 1 MB, half of the L2 cache of such CPUs
#else
constexpr std::int64_t CHUNK_FLOATS = 1 << 17;  // 512 KB, half of a small L2 cache
#endif
constexpr std::int64_t ALL_CHUNKS = 1 << 23;  // of all threads: 32 MB
constexpr std::int64_t CENTRE_OF = 255;  // codes; any m is right, one amid the codes keeps float32 exact
constexpr std::int64_t MIN_ROWS = 512, MAX_ROWS = 4096;  // of one thread: packing a code pays off over many rows
constexpr double WORK_PER_THREAD = 1 << 22;  // multiplications; less is done before a thread has started
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// A matrix as torch has it: any strides, counted in floats.
struct Matrix {
    const float *data;
    std::int64_t row, column;
    float at(std::int64_t i, std::int64_t j) const { return data[i * row + j * column]; }
};

// Memory on a 64-byte boundary.
struct Buffer {
    explicit Buffer(std::int64_t floats) : all(floats + 16) {
        auto address = reinterpret_cast<std::uintptr_t>(all.data());
        data = all.data() + (64 - address % 64) % 64 / 4;
    }
    Buffer(const Buffer &) = delete;
    std::vector<float> all;
    float *data;
};

enum Metric { EUCLIDEAN, COSINE, DOT };

struct Best {
    float score;
    std::int32_t id;
};

// What a code is divided by: for cosine |c|, and no less than torch's normalize takes.
double divisor_of(const Matrix &codes, std::int64_t i, std::int64_t d, Metric metric) {
    if (metric != COSINE) return 1.0;
    double square = 0;
    for (std::int64_t j = 0; j < d; ++j) square += double(codes.at(i, j)) * codes.at(i, j);
    return std::max(std::sqrt(square), 1e-12);
}

bool is_direct(Metric metric, std::int64_t d) { return metric == EUCLIDEAN && d <= 3; }

// The median, number by number, of codes from everywhere in the codebook. Unlike a mean, a few far codes do not move it.
std::vector<float> centre_of(const Matrix &codes, std::int64_t k, std::int64_t d, Metric metric) {
    std::vector<float> centre(d);
    if (is_direct(metric, d)) return centre;
    const std::int64_t step = (k + CENTRE_OF - 1) / CENTRE_OF, count = (k + step - 1) / step;
    std::vector<double> divisor(count);
    for (std::int64_t i = 0; i < count; ++i) divisor[i] = divisor_of(codes, i * step, d, metric);
    std::vector<float> column(count);
    for (std::int64_t j = 0; j < d; ++j) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float value = float(codes.at(i * step, j) / divisor[i]);
            column[i] = std::isfinite(value) ? value : 0;
        }
        std::nth_element(column.begin(), column.begin() + (count - 1) / 2, column.end());
        centre[j] = column[(count - 1) / 2];
    }
    return centre;
}

// Codes first ... last - 1 as panels: per panel the scores' starting values (-|c|^2 / 2 or 0), then d x PANEL numbers.
// Places that are left over, and codes that are not finite, start at -infinity and never win.
void pack_codes(const Matrix &codes, std::int64_t first, std::int64_t last, std::int64_t d, Metric metric,
                const float *centre, float *out) {
    for (std::int64_t i = first; i < last; i += PANEL, out += (d + 1) * PANEL) {
        for (int lane = 0; lane < PANEL; ++lane) {
            bool there = i + lane < last;
            if (there) {
                double divisor = divisor_of(codes, i + lane, d, metric), square = 0;
                for (std::int64_t j = 0; j < d; ++j) {
                    float value = float(codes.at(i + lane, j) / divisor - centre[j]);
                    out[(j + 1) * PANEL + lane] = value;
                    square += double(value) * value;
                }
                there = std::isfinite(float(square));
                out[lane] = metric == EUCLIDEAN && !is_direct(metric, d) ? float(-square / 2) : 0.0f;
            }
            if (!there) {
                out[lane] = LOWEST;
                for (std::int64_t j = 0; j < d; ++j) out[(j + 1) * PANEL + lane] = 0;
            }
        }
    }
}

// ROWS rows as d x ROWS. Rows that are left over, or hold a number that is not finite, are 0.
void pack_rows(const Matrix &z, std::int64_t first, std::int64_t last, std::int64_t d, const float *centre, float *out,
               bool *finite) {
    for (int r = 0; r < ROWS; ++r) {
        finite[r] = first + r < last;
        for (std::int64_t j = 0; finite[r] && j < d; ++j) {
            float value = z.at(first + r, j);
            finite[r] = std::isfinite(value);
            out[j * ROWS + r] = centre ? value - centre[j] : value;
        }
        for (std::int64_t j = 0; !finite[r] && j < d; ++j) out[j * ROWS + r] = 0;
    }
}

// Raises best[r] where one of these panels holds a better code. `id` is that of the first code. DIRECT scores are
// -|z - c|^2.
template <bool DIRECT>
void search(const float *rows, const float *panels, std::int64_t count, std::int64_t d, std::int32_t id, Best *best) {
    Floats score[ROWS];
    Ints step[ROWS];
    for (int r = 0; r < ROWS; ++r) score[r] = LOWEST - Floats{}, step[r] = Ints{};
    for (std::int64_t panel = 0; panel < count; ++panel, panels += (d + 1) * PANEL) {
        const Floats *c = reinterpret_cast<const Floats *>(panels);
        Floats sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = c[v];
        for (std::int64_t j = 0; j < d; ++j) {
            c += VECTORS;
            for (int r = 0; r < ROWS; ++r) {
                Floats x = rows[j * ROWS + r] - Floats{};
                for (int v = 0; v < VECTORS; ++v)
                    if (DIRECT)
                        sum[r][v] -= (x - c[v]) * (x - c[v]);
                    else
                        sum[r][v] += x * c[v];
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                Ints here = Ints{} + std::int32_t(panel * VECTORS + v);
                auto better = sum[r][v] > score[r];  // strict: the first of equals stays
                score[r] = better ? sum[r][v] : score[r];
                step[r] = better ? here : step[r];
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int lane = 0; lane < LANES; ++lane) {
            Best here{score[r][lane], id + step[r][lane] * LANES + lane};
            if (here.score > best[r].score || (here.score == best[r].score && here.id < best[r].id)) best[r] = here;
        }
}

#ifdef WITH_AMX
#include "nearest_amx.h"
#else
struct Screen {  // there is none
    static constexpr std::int64_t ROWS_AT_ONCE = 32;
    Screen(std::int64_t, std::int64_t, std::int64_t) {}
    bool useful() const { return false; }
    void pack(const float *, std::int64_t) {}
    bool search(const Matrix &, std::int64_t, std::int64_t, const float *, const float *, std::int32_t, Best *) {
        return false;
    }
};
#endif

// One group's lookup: rows first_row ... last_row - 1 among codes first_code ... last_code - 1, of which ``chunk``
// floats are packed at a time.
void look_up(const Matrix &z, std::int64_t first_row, std::int64_t last_row, const Matrix &codes,
             std::int64_t first_code, std::int64_t last_code, std::int64_t d, Metric metric, const float *centre,
             std::int64_t chunk, Best *best) {
    const std::int64_t panels = std::max<std::int64_t>(1, chunk / (PANEL * (d + 1)));
    const std::int64_t needed = std::min(panels, (last_code - first_code + PANEL - 1) / PANEL);
    Buffer packed(needed * PANEL * (d + 1)), rows(d * ROWS);
    Screen screen(last_row - first_row, d, needed);
    const float *centre_of_rows = metric == EUCLIDEAN ? centre : nullptr;
    const auto find = is_direct(metric, d) ? search<true> : search<false>;
    bool finite[ROWS];
    for (std::int64_t i = first_row; i < last_row; ++i) best[i - first_row] = Best{LOWEST, 0};
    for (std::int64_t code = first_code; code < last_code; code += panels * PANEL) {
        const std::int64_t end = std::min(code + panels * PANEL, last_code), count = (end - code + PANEL - 1) / PANEL;
        const std::int32_t id = std::int32_t(code);
        pack_codes(codes, code, end, d, metric, centre, packed.data);
        if (screen.useful()) screen.pack(packed.data, count);
        for (std::int64_t i = first_row; i < last_row;) {
            const std::int64_t block = std::min(Screen::ROWS_AT_ONCE, last_row - i);
            if (screen.useful() && screen.search(z, i, block, centre_of_rows, packed.data, id, best + (i - first_row))) {
                i += block;
                continue;
            }
            pack_rows(z, i, last_row, d, centre_of_rows, rows.data, finite);
            Best here[ROWS];
            const std::int64_t there = std::min<std::int64_t>(ROWS, last_row - i);
            std::fill(here, here + ROWS, Best{LOWEST, 0});
            std::copy(best + (i - first_row), best + (i - first_row) + there, here);
            find(rows.data, packed.data, count, d, id, here);
            for (int r = 0; r < there; ++r) best[i - first_row + r] = finite[r] ? here[r] : Best{-LOWEST, 0};
            i += there;
        }
    }
}

std::int64_t parts_of(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

void run(const float *z, const std::int64_t *z_strides, const float *codes, const std::int64_t *code_strides,
         std::int64_t g, std::int64_t n, std::int64_t k, std::int64_t d, Metric metric, std::int64_t threads,
         std::int64_t *ids) {
    // Threads share out the rows; where these are few, the codes too, so that each packs its own part of them only.
    threads = std::clamp<std::int64_t>(double(g) * n * k * d / WORK_PER_THREAD, 1, threads);
    const std::int64_t row_part = std::clamp<std::int64_t>(parts_of(g * n, threads), MIN_ROWS, MAX_ROWS) / ROWS * ROWS;
    const std::int64_t row_parts = parts_of(n, row_part);
    const std::int64_t code_part = parts_of(parts_of(k, parts_of(threads, g * row_parts)), PANEL) * PANEL;
    const std::int64_t code_parts = parts_of(k, code_part);
    const std::int64_t jobs = g * row_parts * code_parts;

    auto group = [&](std::int64_t i) {
        return std::pair<Matrix, Matrix>{{z + i * z_strides[0], z_strides[1], z_strides[2]},
                                         {codes + i * code_strides[0], code_strides[1], code_strides[2]}};
    };
    std::vector<std::vector<float>> centres;
    for (std::int64_t i = 0; i < g; ++i) centres.push_back(centre_of(group(i).second, k, d, metric));
    std::vector<Best> best(code_parts > 1 ? g * n * code_parts : 0);

    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    auto work = [&]() noexcept {
        try {
            std::vector<Best> own(code_parts > 1 ? 0 : row_part);
            for (std::int64_t job; !failed && (job = next++) < jobs;) {
                const std::int64_t c = job % code_parts, rest = job / code_parts;
                const std::int64_t i = rest / row_parts, row = rest % row_parts * row_part;
                const std::int64_t last = std::min(row + row_part, n);
                Best *out = code_parts > 1 ? best.data() + (i * code_parts + c) * n + row : own.data();
                const auto [rows, book] = group(i);
                look_up(rows, row, last, book, c * code_part, std::min((c + 1) * code_part, k), d, metric,
                        centres[i].data(), std::min(CHUNK_FLOATS, ALL_CHUNKS / threads), out);
                if (code_parts == 1)
                    for (std::int64_t r = row; r < last; ++r) ids[i * n + r] = out[r - row].id;
            }
        } catch (...) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    try {
        for (std::int64_t t = 1; t < std::min(threads, jobs); ++t) others.emplace_back(work);
    } catch (const std::system_error &) {
        // No more threads to be had: those that run do it all.
    }
    work();
    for (auto &other : others) other.join();
    if (failed) throw std::bad_alloc();

    for (std::int64_t i = 0; code_parts > 1 && i < g; ++i)
        for (std::int64_t r = 0; r < n; ++r) {
            const Best *part = best.data() + i * code_parts * n + r;
            Best winner = part[0];
            for (std::int64_t c = 1; c < code_parts; ++c)
                if (part[c * n].score > winner.score) winner = part[c * n];
            ids[i * n + r] = winner.id;
        }
}

}  // namespace

// metric: 0 Euclid, 1 cosine, 2 dot. z: g n d and codes: g k d, float32, any strides (three each, in floats); k < 2^31. ids: g n, contiguous.
// A row that holds a number that is not finite has id 0. Returns 0, or 1 when memory ran out.
extern "C" int nearest_code(const float *z, const std::int64_t *z_strides, const float *codes,
                            const std::int64_t *code_strides, std::int64_t g, std::int64_t n, std::int64_t k,
                            std::int64_t d, int metric, std::int64_t threads, std::int64_t *ids) {
    try {
        if (g * n > 0) run(z, z_strides, codes, code_strides, g, n, k, d, Metric(metric), threads, ids);
        return 0;
    } catch (...) {
        return 1;
    }
}
