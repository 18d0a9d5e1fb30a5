// What r1-convert packs, r1 reads back: rows through convert/quantize.c and r1.c's read_row(), for every dtype.
#include "../r1.c"
#include "../convert/quantize.c"

static int failures;

static void check(bool fine, const char *what, const char *format, double got, double bound) {
    char why[128];
    snprintf(why, sizeof why, format, got, bound);
    if (fine) printf("ok   %s\n", what);
    else printf("FAIL %s: %s\n", what, why);
    failures += !fine;
}

// Normally distributed, from two evenly distributed numbers (Box and Muller).
static float draw_normal(uint64_t *state) {
    double u = draw_uniform(state), v = draw_uniform(state);
    return (float)(sqrt(-2 * log(1 - u)) * cos(2 * M_PI * v));
}

// Root mean square error, over that of the rows, after a way there and back.
static double round_trip(uint32_t dtype, const float *rows, size_t row_count, size_t cols) {
    uint8_t *panel = aligned_alloc(64, align_up(panel_bytes(dtype, cols), 64));
    void *scratch = malloc(pack_scratch_bytes(dtype, cols) + 1);
    float *copy = malloc(row_count * cols * sizeof *copy), *back = malloc(cols * sizeof *back);
    memcpy(copy, rows, row_count * cols * sizeof *copy);
    pack_panel(dtype, copy, row_count, cols, panel, scratch);
    struct Matrix matrix = {.data = panel, .dtype = dtype, .rows = row_count, .cols = cols, .panel_step = panel_bytes(dtype, cols)};
    double error = 0, sum = 0;
    for (size_t r = 0; r < row_count; r++) {
        read_row(&matrix, r, back);
        for (size_t k = 0; k < cols; k++) {
            double x = rows[r * cols + k], d = back[k] - x;
            error += d * d;
            sum += x * x;
        }
    }
    free(panel);
    free(scratch);
    free(copy);
    free(back);
    return sqrt(error / sum);
}

int main(void) {
    // 2^-8 / sqrt(12) and the like would be tighter; these bounds catch a wrong layout, scale, sign or rotation.
    static const struct { uint32_t dtype; double bound; } cases[] = {
        {DTYPE_F32, 0}, {DTYPE_BF16, 0.003}, {DTYPE_Q8, 0.008}, {DTYPE_Q6, 0.03}, {DTYPE_Q4, 0.075}};
    static const size_t widths[] = {32, 64, 96, 224, 256, 288, 480, 1536};
    uint64_t state = 7;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
            size_t cols = widths[w], row_count = 32 - w;   // a ragged panel, too
            float *rows = malloc(row_count * cols * sizeof *rows);
            for (size_t k = 0; k < row_count * cols; k++) rows[k] = draw_normal(&state) * (k % 5 ? 0.02f : 0.1f);
            double got = round_trip(cases[i].dtype, rows, row_count, cols);
            char what[96];
            snprintf(what, sizeof what, "quantize: %s, %zu columns there and back", dtype_name(cases[i].dtype), cols);
            check(got <= cases[i].bound, what, "relative error %.4g, expected at most %.4g", got, cases[i].bound);
            free(rows);
        }

    // The rotation: its way back is exact to rounding, lengths stay, and a lone large column is spread over all.
    for (size_t n = 32; n <= K_BLOCK; n *= 2) {
        float x[K_BLOCK], turned[K_BLOCK], back[K_BLOCK];
        double before = 0, after = 0, difference = 0, largest = 0;
        for (size_t k = 0; k < n; k++) x[k] = draw_normal(&state);
        rotate_columns(x, n, turned);
        rotate_columns_back(turned, n, back);
        for (size_t k = 0; k < n; k++) {
            before += (double)x[k] * x[k];
            after += (double)turned[k] * turned[k];
            difference = fmax(difference, fabs(back[k] - x[k]));
        }
        memset(x, 0, sizeof x);
        x[n / 3] = 1;
        rotate_columns(x, n, turned);
        for (size_t k = 0; k < n; k++) largest = fmax(largest, fabs(turned[k]));
        char what[96];
        snprintf(what, sizeof what, "quantize: rotation of %zu columns and back", n);
        check(difference < 1e-5, what, "a value is off by %.3g, expected less than %.3g", difference, 1e-5);
        snprintf(what, sizeof what, "quantize: rotation of %zu columns keeps lengths", n);
        check(fabs(after / before - 1) < 1e-5, what, "squared length times %.7g, expected %.1f", after / before, 1.0);
        snprintf(what, sizeof what, "quantize: rotation of %zu columns spreads one column evenly", n);
        check(fabs(largest * sqrt((double)n) - 1) < 1e-5, what, "largest is %.6g, expected %.6g", largest, 1 / sqrt((double)n));
    }
    return failures != 0;
}
