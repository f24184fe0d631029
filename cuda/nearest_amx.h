// A screen before the exact search, for CPUs with AMX (Intel's bf16 matrix units, eight times as fast as float32).
// Included by nearest.cpp, whose names it uses. It changes no result:
//
// With x~, c~ the vectors rounded to bf16, |x.c - x~.c~| <= |x - x~| |c| + |x~| |c - c~| (Cauchy-Schwarz). So where the
// best rounded score of 16 codes, plus that bound, is below what a row is sure to have elsewhere, none of the 16 wins.
// Only the others, mostly one or two of hundreds, are scored in float32, by the same operations as everywhere. Where it
// turns out to be many, as for codes that lie very close together, the screen gives up.

// Linux lends the tiles' registers to a process that asks. True when it does.
bool amx_allowed() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

class Screen {
  public:
    static constexpr std::int64_t ROWS_AT_ONCE = 32;
    static constexpr std::int64_t MIN_WIDTH = 12;      // below, float32 is as fast
    static constexpr std::int64_t MIN_JOB_ROWS = 128;  // below, packing the codes twice does not pay off

    Screen(std::int64_t job_rows, std::int64_t d, std::int64_t panels)
        : d(d), steps((d + 31) / 32), on(job_rows >= MIN_JOB_ROWS && d >= MIN_WIDTH && amx_allowed()),
          rows(on ? ROWS_AT_ONCE * steps * 32 : 0), row_tiles(on ? 2 * steps * TILE : 0),
          code_tiles(on ? (panels * VECTORS + 1) * steps * TILE : 0), norm(on ? panels * VECTORS : 0),
          error(on ? panels * VECTORS : 0), most(on ? panels * VECTORS * ROWS_AT_ONCE : 0) {
        if (!on) return;
        struct {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Screen() {
        if (on) _tile_release();
    }
    Screen(const Screen &) = delete;

    // Whether the next rows go through the screen: not while more than one vector of codes in eight has to be scored.
    bool useful() const { return on && 8 * scored <= seen + 1024; }

    // Rounds the codes of packed panels: per vector of 16 codes and step of 32 numbers a tile, 16 x 32.
    void pack(const float *panels, std::int64_t count) {
        vectors = count * VECTORS;
        greatest_norm = 0;
        for (std::int64_t v = 0; v < vectors; ++v) {
            const float *c = start_of(panels, v);
            auto *tiles = reinterpret_cast<std::int32_t *>(code_tiles.data + v * steps * TILE);
            Floats square{}, lost{};
            for (std::int64_t j = 0; j < d; j += 2) {
                const Ints low = rounded(load(c + (j + 1) * PANEL), square, lost);
                const Ints high = j + 1 < d ? rounded(load(c + (j + 2) * PANEL), square, lost) : Ints{};
                const Ints both = (low >> 16 & 0xffff) | high;
                std::int32_t *to = tiles + j / 32 * TILE + j % 32 / 2;
                for (int lane = 0; lane < LANES; ++lane) to[lane * 16] = both[lane];
            }
            norm.data[v] = error.data[v] = 0;
            for (int lane = 0; lane < LANES; ++lane) {
                norm.data[v] = std::max(norm.data[v], root(square[lane]));
                error.data[v] = std::max(error.data[v], root(lost[lane]));
            }
            greatest_norm = std::max(greatest_norm, norm.data[v]);
        }
    }

    // Raises best[0 ... count - 1] of the rows first ... first + count - 1, count <= 32. Returns false, having done
    // nothing, when their numbers are too large for sums in float32.
    bool search(const Matrix &z, std::int64_t first, std::int64_t count, const float *centre, const float *panels,
                std::int32_t id, Best *best) {
        alignas(64) float norm_x[ROWS_AT_ONCE], error_x[ROWS_AT_ONCE], score[ROWS_AT_ONCE], sums[4 * TILE];
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            const bool finite = pack_row(z, first + r, r < count, centre, r, norm_x[r], error_x[r]);
            if (!(norm_x[r] * greatest_norm < 1e30f)) return false;
            if (r < count && !finite) best[r] = Best{-LOWEST, 0};
            score[r] = r < count ? best[r].score : -LOWEST;
        }
        const float rounding = float(d + 8) * 2.4e-7f;  // of the sums themselves, these and the exact ones
        // What each row's best score is at least, and what 16 codes can give at most. The lanes are rows here.
        Floats least[2] = {load(score), load(score + 16)};
        for (std::int64_t pair = 0; pair < vectors; pair += 2) {
            multiply(code_tiles.data + pair * steps * TILE, sums);
            for (int part = 0; part < 4 && pair + part / 2 < vectors; ++part) {
                const std::int64_t v = pair + part / 2;
                const int half = part % 2;
                const float *start = start_of(panels, v);
                Floats top = LOWEST - Floats{};
                for (int lane = 0; lane < LANES; ++lane) {
                    const Floats sum = load(sums + part * TILE + lane * 16) + start[lane];
                    top = sum > top ? sum : top;
                }
                const float c = norm.data[v];
                const Floats x = load(norm_x + half * 16), lost = load(error_x + half * 16);
                const Floats bound = lost * c + (x + lost) * error.data[v] + rounding * (x + c) * c + 1e-36f;
                least[half] = top - bound > least[half] ? top - bound : least[half];
                *reinterpret_cast<Floats *>(most.data + v * ROWS_AT_ONCE + half * 16) = top + bound;
            }
        }
        Pair maybe[BATCH];
        int found = 0;
        for (std::int64_t v = 0; v < vectors; ++v)
            for (int half = 0; half < 2; ++half) {
                const Floats here = load(most.data + v * ROWS_AT_ONCE + half * 16);
                for (unsigned mask = _mm512_cmp_ps_mask(__m512(here), __m512(least[half]), _CMP_GE_OQ); mask;
                     mask &= mask - 1) {
                    maybe[found++] = Pair{v, half * 16 + __builtin_ctz(mask)};
                    ++scored;
                    if (found == BATCH) exact(panels, maybe, found, id, best), found = 0;
                }
            }
        if (found) {
            std::fill(maybe + found, maybe + BATCH, maybe[0]);
            exact(panels, maybe, found, id, best);
        }
        seen += vectors * ROWS_AT_ONCE;
        return true;
    }

  private:
    static constexpr int TILE = 256;  // floats, of 16 rows with 64 bytes
    static constexpr int BATCH = 8;   // sums that run side by side

    // A vector of 16 codes, and a row of the block.
    struct Pair {
        std::int64_t vector;
        int row;
    };

    // The starting values of a vector's scores; its numbers follow in steps of PANEL.
    const float *start_of(const float *panels, std::int64_t vector) const {
        return panels + vector / VECTORS * (d + 1) * PANEL + vector % VECTORS * LANES;
    }

    static Floats load(const float *from) { return *reinterpret_cast<const Floats *>(from); }

    // A norm from its square, rounded up by more than float32's sums lose.
    static float root(float square) { return std::sqrt(square) * 1.0001f; }

    // The bf16 numbers nearest to the values, in the upper halves; the units take subnormal ones for 0. Adds up the
    // squares of the values and of what is lost.
    static Ints rounded(Floats value, Floats &square, Floats &lost) {
        Ints bits = (Ints)value;  // the same bits
        bits = (bits & 0x7f800000) == 0 ? Ints{} : (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff;
        const Floats difference = value - (Floats)bits;
        square += value * value;
        lost += difference * difference;
        return bits;
    }

    // Row i of z as row r of the block: in float32, and rounded, in pairs of numbers as the units want them. A row that
    // is not there or not finite is 0. Returns whether it is finite.
    bool pack_row(const Matrix &z, std::int64_t i, bool there, const float *centre, int r, float &norm_x,
                  float &error_x) {
        bool finite = there;
        float *row = rows.data + r * steps * 32;
        for (std::int64_t j = 0; there && j < d; ++j) {
            const float value = z.at(i, j);
            finite &= std::isfinite(value);
            row[j] = centre ? value - centre[j] : value;
        }
        if (!finite) std::fill(row, row + d, 0.0f);
        auto *tiles = reinterpret_cast<std::int32_t *>(row_tiles.data + r / 16 * steps * TILE) + r % 16;
        Floats square{}, lost{};
        for (std::int64_t j = 0; j < d; j += LANES) {
            const Ints bits = rounded(load(row + j), square, lost);
            for (int p = 0; p < LANES / 2; ++p)
                tiles[(j + 2 * p) / 2 * 16] = (bits[2 * p] >> 16 & 0xffff) | bits[2 * p + 1];
        }
        norm_x = error_x = 0;
        for (int lane = 0; lane < LANES; ++lane) norm_x += square[lane], error_x += lost[lane];
        norm_x = root(norm_x), error_x = root(error_x);
        return finite;
    }

    // Two vectors of codes times two tiles of rows: four tiles of sums, 16 codes x 16 rows.
    void multiply(const float *codes, float *sums) const {
        const float *x = row_tiles.data;
        asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, codes + step * TILE, 64);
            _tile_loadd(5, codes + (steps + step) * TILE, 64);
            _tile_loadd(6, x + step * TILE, 64);
            _tile_loadd(7, x + (steps + step) * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + TILE, 64);
        _tile_stored(2, sums + 2 * TILE, 64);
        _tile_stored(3, sums + 3 * TILE, 64);
    }

    // Scores 16 codes for each pair's row, as the search in float32 does. `id` is that of the panels' first code.
    void exact(const float *panels, const Pair *pairs, int count, std::int32_t id, Best *best) const {
        Floats sum[BATCH];
        const float *c[BATCH], *x[BATCH];
        for (int q = 0; q < BATCH; ++q) {
            c[q] = start_of(panels, pairs[q].vector);
            x[q] = rows.data + pairs[q].row * steps * 32;
            sum[q] = load(c[q]);
        }
        for (std::int64_t j = 0; j < d; ++j)
            for (int q = 0; q < BATCH; ++q) sum[q] += (x[q][j] - Floats{}) * load(c[q] + (j + 1) * PANEL);
        for (int q = 0; q < count; ++q) {
            Best &mine = best[pairs[q].row];
            const std::int32_t first = id + std::int32_t(pairs[q].vector * LANES);
            for (int lane = 0; lane < LANES; ++lane)
                if (sum[q][lane] > mine.score) mine = Best{sum[q][lane], first + lane};
        }
    }

    const std::int64_t d, steps;
    const bool on;
    Buffer rows, row_tiles, code_tiles, norm, error, most;
    std::int64_t vectors = 0, seen = 0, scored = 0;
    float greatest_norm = 0;
};
